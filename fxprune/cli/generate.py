"""The commands that generate text with saved models, and chat."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import typer

from fxprune.cli import options as flags
from fxprune.cli.console import Command, MeasuringCommand, app, console, print_json, print_lines
from fxprune.cli.models import check_model, check_models, load, load_pair, load_words
from fxprune.errors import ArgumentError, FxpruneError


@app.command(cls=MeasuringCommand)
def generate(
    model: flags.Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 32,
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
        if raw or not tokenizer.chat_template:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        else:
            inputs = _turns(tokenizer, [{"role": "user", "content": prompt}])
        torch.manual_seed(seed)
        with readable(place, "cannot generate", "Check its weights for values that are not finite, and --temperature"):
            texts[name] = _generate(loaded, tokenizer, inputs, streams=not as_json, **options)
    if as_json:
        print_json(texts)


@app.command(cls=Command)
def chat(
    model: flags.Folder,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    quiet: flags.QuietButResult = False,
) -> None:
    """Chat with MODEL, dense or slim, in its own template and with its own settings, until Ctrl-D."""
    check_model(model, with_weights=True)
    tokenizer = load_words(model)
    if not tokenizer.chat_template:
        remedy = "`fxprune generate` continues a text"
        raise FxpruneError("its tokenizer has no chat template", where=model, remedy=remedy)
    loaded = load(model, dtype=dtype, device=device)
    messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            text = console.input("> ").strip()
        except EOFError:
            break
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        inputs = _turns(tokenizer, messages)
        answer = _generate(loaded, tokenizer, inputs, streams=True, max_new_tokens=max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
    print_lines([""])


def _turns(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _generate(model: Any, tokenizer: Any, inputs: Any, *, streams: bool, **options: Any) -> str:
    """The text that a model generates; ``streams`` to print it as it comes."""
    from transformers import TextStreamer

    from fxprune.graph.context import quiet

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    with quiet(logging.WARNING):
        ids = model.generate(**inputs.to(model.device), **options, streamer=streamer)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
