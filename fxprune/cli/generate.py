"""The commands that generate text with saved models, and chat."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import typer

from fxprune.cli import options as flags
from fxprune.cli.console import Command, MeasuringCommand, app, console, print_json, print_lines
from fxprune.cli.models import check_model, check_models, load_pair, load_predictor, load_words
from fxprune.errors import ArgumentError, CheckpointError, FxpruneError


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
            inputs = _turns(place, tokenizer, [{"role": "user", "content": prompt}])
        torch.manual_seed(seed)
        texts[name] = _generate(place, loaded, tokenizer, inputs, streams=not as_json, **options)
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
    loaded = load_predictor(model, dtype=dtype, device=device)
    messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            text = console.input("> ").strip()
        except EOFError:
            break
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        inputs = _turns(model, tokenizer, messages)
        answer = _generate(model, loaded, tokenizer, inputs, streams=True, max_new_tokens=max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
    print_lines([""])


def _turns(place: str, tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    from fxprune.checkpoint.read import readable

    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    remedy = "Correct the template, or use `fxprune generate` with --raw"
    with readable(place, "its chat template refuses the messages", remedy):
        return tokenizer.apply_chat_template(messages, **options)


def _generate(place: str, model: Any, tokenizer: Any, inputs: Any, *, streams: bool, **options: Any) -> str:
    """The text that the model of a folder generates; ``streams`` to print it as it comes."""
    from transformers import TextStreamer

    from fxprune.checkpoint.read import readable
    from fxprune.evaluation.perplexity import positions_named
    from fxprune.graph.context import quiet

    def check(_: Any, logits: Any) -> Any:
        if not logits.amax(-1).isfinite().all():  # some of them may be -inf
            raise CheckpointError("cannot generate: its logits are not finite", where=place, remedy=weights)
        return logits

    ids, weights = inputs["input_ids"], "Check its weights for values that are not finite"
    if not ids.numel():
        remedy = "Give a text of words that it knows"
        raise ArgumentError(f"the tokenizer of {place} makes no token of it", where="PROMPT", remedy=remedy)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    most = ids.shape[1] + options["max_new_tokens"]
    fewer = "Give a shorter prompt, or fewer --max-new-tokens"
    unsafe = [] if options.get("do_sample") else [check]  # torch itself refuses to sample from such logits
    with (
        readable(place, "cannot generate", f"{weights}{', and --temperature' if options.get('temperature') else ''}"),
        positions_named((model,), most, place, fewer, [int(ids.max())]),
        quiet(logging.WARNING),
    ):
        found = model.generate(**inputs.to(model.device), **options, streamer=streamer, logits_processor=unsafe)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
