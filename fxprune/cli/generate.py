"""The command that lets saved models continue a text."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import typer

from fxprune.cli import options as flags
from fxprune.cli.console import MeasuringCommand, app, print_json, print_lines
from fxprune.cli.models import check_models, load_pair
from fxprune.errors import ArgumentError


@app.command(cls=MeasuringCommand)
def generate(
    model: flags.Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 32,
    compare: Annotated[str | None, typer.Option(help="Model whose text comes first, usually the dense one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt without a chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Above 0: sample; at 0: the likeliest token.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of sampling.")] = 0,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    quiet: flags.QuietButResult = False,
    as_json: flags.Json = False,
) -> None:
    """Print how MODEL, dense or slim, continues PROMPT; a model with a chat template answers it."""
    import torch

    from fxprune.checkpoint.read import readable

    if not math.isfinite(temperature):
        raise ArgumentError(f"is {temperature}", where="--temperature", remedy="Give a finite number")
    if not prompt.strip():
        raise ArgumentError("the prompt is empty", where="PROMPT", remedy="Give some text")
    models = check_models([*([compare] if compare else []), model])
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    options |= {"temperature": temperature} if temperature else {}
    texts = {}
    for name, place in models.items():
        loaded, tokenizer = load_pair(place, dtype=dtype, device=device)
        if len(models) > 1:
            print_lines([f"{name}:"])
        inputs = _inputs(tokenizer, prompt, raw=raw).to(loaded.device)
        torch.manual_seed(seed)
        with readable(place, "cannot generate", "Check its weights for values that are not finite, and --temperature"):
            texts[name] = _continue(loaded, tokenizer, inputs, options, streams=not as_json)
    if as_json:
        print_json(texts)


def _inputs(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    """The tokens of a prompt: a turn of a chat if the tokenizer has a template, else the text itself."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _continue(model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], *, streams: bool) -> str:
    """The text that a model generates; ``streams`` to print it as it comes."""
    from transformers import TextStreamer

    from fxprune.graph.context import quiet

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    with quiet(logging.WARNING):
        ids = model.generate(**inputs, **options, streamer=streamer)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
