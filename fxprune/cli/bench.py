"""The command that times saved models in transformers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

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
    progress,
    set_output,
)
from fxprune.cli.load import load_either
from fxprune.cli.several import checked

if TYPE_CHECKING:
    from fxprune.evaluation.speed import Speed

__all__ = ["bench"]


@app.command()
def bench(
    model: Folder,
    others: Annotated[
        list[str] | None, typer.Argument(help="Further models; the first is what they are compared with.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts side by side.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each model generates; medians are told.")] = 5,
    dtype: Dtype = None,
    device: Device = None,
    quiet: QuietButResult = False,
    as_json: Json = False,
) -> None:
    """Time MODEL and OTHERS, dense or slim, as they generate in transformers."""
    with clear_errors():
        set_output(quiet=quiet, as_json=as_json, results=True)
        models = checked([model, *(others or ())], dtype, device)
        from fxprune.evaluation.speed import measure_speed

        options: dict[str, Any] = {"with_tokenizer": False, "dtype": dtype, "device": device}
        loaded = {name: load_either(place, None, **options)[0] for name, place in models.items()}
        speeds = measure_speed(loaded, prompt=prompt, tokens=tokens, batch=batch, rounds=rounds, track=progress)
        if as_json:
            print_json({name: speed.to_dict() for name, speed in speeds.items()})
            return
        console.print(_table(speeds))
        where = next(iter(loaded.values())).device
        console.print(
            f"batch {batch}, prompt of {prompt:,} tokens, then {tokens:,}; medians of {rounds} rounds on {where}"
        )


def _table(speeds: Mapping[str, Speed]) -> Table:
    """One column a model; behind times and bytes what they are of the first one's."""
    table = Table("", *speeds)
    first = next(iter(speeds.values()))
    table.add_row("parameters", *(f"{one.parameters:,}" for one in speeds.values()))
    table.add_row("prompt, ms", *(_faster(one.prefill_ms, first.prefill_ms) for one in speeds.values()))
    table.add_row("prompt, tokens a second", *(f"{one.prefill_rate:,.0f}" for one in speeds.values()))
    table.add_row("a further token, ms", *(_faster(one.decode_ms, first.decode_ms) for one in speeds.values()))
    table.add_row("generated, tokens a second", *(f"{one.decode_rate:,.1f}" for one in speeds.values()))
    for title, field in (("weights", "weights"), ("keys and values", "cache"), ("most of the GPU", "peak")):
        held = [getattr(one, field) for one in speeds.values()]
        if None not in held:
            table.add_row(f"{title}, MB", *(f"{value / 1e6:,.1f}" for value in held))
    return table


def _faster(value: float, first: float) -> str:
    return f"{value:,.1f}" if value is first else f"{value:,.1f} ({first / value:.2f} x)"
