"""The command that measures generation speed of saved models in transformers, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.console import MeasuringCommand, app, print_json, print_lines, print_table, progress, working
from fxprune.cli.models import check_models, load
from fxprune.errors import ArgumentError, EvaluationError, RatioError

if TYPE_CHECKING:
    from fxprune.evaluation.speed import Speed


def slim_versions(model: Any) -> tuple[dict[str, Any], Any]:
    """Slim models of a few sizes with random units removed, by name, and the file for their times.

    Raises:
        EvaluationError: there is no slim model to time.
    """
    from fxprune.evaluation.speed import times_file
    from fxprune.graph.counting import count_parameters
    from fxprune.graph.tensors import device_of

    found: dict[str, Any] = {}
    with working("tracing the model"):
        graph_module = fxprune.trace(model).graph_module
    place = times_file(count_parameters(graph_module), device_of(graph_module))
    for ratio in (0.15, 0.3, 0.45):
        pipeline = fxprune.prune_pipeline(recipe="fast", importance="random", ratio=ratio, verify=False)
        with working(f"pruning by {ratio:.0%}"):
            try:
                result = fxprune.Result.of(pipeline(graph_module).graph_module)
            except RatioError as error:
                if not found:
                    raise EvaluationError(error.what, where="--sweep", remedy=error.remedy) from error
                break
        if result.model is None:
            reasons = "; ".join(result.report.model_reasons[:3])
            remedy = "Time exported graphs, and name the table as in '1.3x decode@times.json'"
            raise EvaluationError(f"there is no slim model to time: {reasons}", where="--sweep", remedy=remedy)
        found[f"{ratio:.0%} less"] = result.model
    return found, place


_SWEEP = "Time versions of MODEL with 15%, 30% and 45% less, and keep the times for targets such as '1.3x decode'."


@app.command(cls=MeasuringCommand)
def bench(
    model: flags.Folder,
    others: Annotated[list[str] | None, typer.Argument(help="Further models; all are compared with the first.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, of which the median is reported.")] = 5,
    sweep: Annotated[bool, typer.Option("--sweep", help=_SWEEP)] = False,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    quiet: flags.QuietButResult = False,
    as_json: flags.Json = False,
) -> None:
    """Time MODEL and OTHERS, dense or slim, as they generate in transformers."""
    from fxprune.evaluation.speed import measure_speed
    from fxprune.offload.atomic import write_file

    if sweep and others:
        raise ArgumentError("is for one model", where="--sweep", remedy="Leave the other models out")
    models = check_models([model, *(others or ())])
    loaded = {name: load(place, dtype=dtype, device=device) for name, place in models.items()}
    kept = None
    if sweep:
        slim, kept = slim_versions(*loaded.values())
        loaded |= slim
    speeds = measure_speed(loaded, prompt=prompt, tokens=tokens, batch=batch, rounds=rounds, track=progress)
    if kept is not None:
        table = json.dumps({name: speed.to_dict() for name, speed in speeds.items()}, indent=2)
        write_file(kept, f"{table}\n", EvaluationError, parents=True)
    if as_json:
        print_json({name: speed.to_dict() for name, speed in speeds.items()})
        return
    print_table(("", *speeds), _rows([*speeds.values()]))
    where = next(iter(loaded.values())).device
    print_lines([f"batch {batch}, prompt of {prompt:,} tokens, then {tokens:,}; medians of {rounds} rounds on {where}"])
    if kept is not None:
        print_lines([f"kept in {kept}, for targets such as '1.3x decode'"])


def _rows(speeds: Sequence[Speed]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each figure; times are followed by the speed-up over the first model."""

    def times(field: str) -> tuple[str, ...]:
        first, *others = (getattr(one, field) for one in speeds)
        return (f"{first:,.1f}", *(f"{value:,.1f} ({first / value:.2f} x)" for value in others))

    yield "parameters", *(f"{one.parameters:,}" for one in speeds)
    yield "prompt, ms", *times("prefill_ms")
    yield "prompt, tokens a second", *(f"{one.prefill_rate:,.0f}" for one in speeds)
    yield "each further token, ms", *times("decode_ms")
    if len(speeds) > 1:
        yield (
            "  times as fast, by rounds",
            "",
            *("{:.2f} ({:.2f} to {:.2f})".format(*one.speed_up) for one in speeds[1:]),
        )
    yield "generated, tokens a second", *(f"{one.decode_rate:,.1f}" for one in speeds)
    for title, field in (("weights", "weights"), ("keys and values", "cache"), ("peak GPU memory", "peak")):
        held = [getattr(one, field) for one in speeds]
        if None not in held:
            yield f"{title}, MB", *(f"{value / 1e6:,.1f}" for value in held)
