"""The command that lets a saved model go on with a text."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import typer

from fxprune.cli.console import (
    Device,
    Dtype,
    Folder,
    Json,
    QuietButResult,
    app,
    clear_errors,
    console,
    print_json,
    set_output,
)
from fxprune.cli.load import load_either, readable
from fxprune.cli.several import checked
from fxprune.errors import ArgumentError

__all__ = ["generate"]

_CHECK = "Check its weights for values that are not finite, and --temperature"


@app.command()
def generate(
    model: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on with, or to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 32,
    compare: Annotated[str | None, typer.Option(help="Model whose text comes first, as a rule the dense one.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the prompt as it is, without a chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Above 0: sample; 0 takes the likeliest token.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="For sampling.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: QuietButResult = False,
    as_json: Json = False,
) -> None:
    """Print what MODEL, dense or slim, makes of PROMPT, as it comes; a model that chats answers."""
    with clear_errors():
        set_output(quiet=quiet, as_json=as_json, results=True)
        if not math.isfinite(temperature):
            raise ArgumentError(f"temperature is {temperature}", where="temperature", remedy="Give a finite number")
        if not prompt.strip():
            raise ArgumentError("the prompt is empty", where="PROMPT", remedy="Give some text")
        models = checked([*([compare] if compare else []), model], dtype, device)
        options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        options |= {"temperature": temperature} if temperature else {}
        texts = {}
        for name, place in models.items():
            loaded, tokenizer = load_either(place, None, with_tokenizer=True, dtype=dtype, device=device)
            if len(models) > 1 and not as_json:
                console.print(f"{name}:", markup=False, highlight=False)
            inputs = _inputs(tokenizer, prompt, raw=raw).to(loaded.device)
            with readable(place, "cannot generate", _CHECK):
                texts[name] = _continued(loaded, tokenizer, inputs, {**options, "seed": seed}, streams=not as_json)
        if as_json:
            print_json(texts)


def _inputs(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    """Return the tokens of a prompt: a turn of a chat where the tokenizer has a template, else the text itself."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _continued(model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], *, streams: bool) -> str:
    """Return the text that a model goes on with.

    Args:
        model: the model.
        tokenizer: its own.
        inputs: tokens to go on with, with their mask.
        options: of generation, and the seed.
        streams: whether text is printed as it comes.
    """
    import torch
    from transformers import TextStreamer

    from fxprune.graph.context import quiet

    torch.manual_seed(options.pop("seed"))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    with quiet(logging.WARNING):
        ids = model.generate(**inputs, **options, streamer=streamer)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
