"""The command that times saved models in transformers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fxprune.cli import options as flags
from fxprune.cli.console import MeasuringCommand, app, console, print_json, print_lines, progress
from fxprune.cli.models import check_models, load

if TYPE_CHECKING:
    from fxprune.evaluation.speed import Speed

__all__ = ["bench"]


@app.command(cls=MeasuringCommand)
def bench(
    model: flags.Folder,
    others: Annotated[list[str] | None, typer.Argument(help="Further models; all are compared with the first.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, of which the median is reported.")] = 5,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    quiet: flags.QuietButResult = False,
    as_json: flags.Json = False,
) -> None:
    """Time MODEL and OTHERS, dense or slim, as they generate in transformers."""
    from fxprune.evaluation.speed import measure_speed

    models = check_models([model, *(others or ())])
    loaded = {name: load(place, dtype=dtype, device=device) for name, place in models.items()}
    speeds = measure_speed(loaded, prompt=prompt, tokens=tokens, batch=batch, rounds=rounds, track=progress)
    if as_json:
        print_json({name: speed.to_dict() for name, speed in speeds.items()})
        return
    console.print(_table(speeds))
    where = next(iter(loaded.values())).device
    print_lines([f"batch {batch}, prompt of {prompt:,} tokens, then {tokens:,}; medians of {rounds} rounds on {where}"])


def _table(speeds: Mapping[str, Speed]) -> Table:
    """A column for each model; times are followed by the speed-up over the first."""
    table = Table("", *speeds)
    first = next(iter(speeds.values()))
    table.add_row("parameters", *(f"{one.parameters:,}" for one in speeds.values()))
    table.add_row("prompt, ms", *(_speedup(one.prefill_ms, first.prefill_ms) for one in speeds.values()))
    table.add_row("prompt, tokens a second", *(f"{one.prefill_rate:,.0f}" for one in speeds.values()))
    table.add_row("each further token, ms", *(_speedup(one.decode_ms, first.decode_ms) for one in speeds.values()))
    table.add_row("generated, tokens a second", *(f"{one.decode_rate:,.1f}" for one in speeds.values()))
    for title, field in (("weights", "weights"), ("keys and values", "cache"), ("peak GPU memory", "peak")):
        held = [getattr(one, field) for one in speeds.values()]
        if None not in held:
            table.add_row(f"{title}, MB", *(f"{value / 1e6:,.1f}" for value in held))
    return table


def _speedup(value: float, first: float) -> str:
    return f"{value:,.1f}" if value is first else f"{value:,.1f} ({first / value:.2f} x)"
