"""Is it faster, and as much as it should be? Dense against slim, engine by engine: `make bench`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.demo_model import load_named
from benchmarks.engines import ENGINES
from benchmarks.environment import environment, write_results
from benchmarks.latency.candidates import Candidate, candidates
from benchmarks.latency.measure import HEADING, Row, Settings, measure, read_rows
from benchmarks.latency.sweep import sweep
from benchmarks.latency.workers import Writers, quiet

__all__ = ["RESULTS", "app"]

RESULTS = Path(__file__).parent.parent / "results"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model; else the demo model.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions of the parameters; 0.2 and 0.5.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Sequences x tokens; 1x128 and 8x32.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Names of engines; all but torch.compile.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of two measurements of each model.")] = 4,
    round_to: Annotated[int, typer.Option(min=1, help="Widths of MLPs are multiples of it.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU where there is one.")] = "",
    only_sweep: Annotated[bool, typer.Option("--sweep", help="Measure what aligned widths buy here instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Keep results in benchmarks/results/.")] = False,
) -> None:
    """Time the dense model, slim ones, and those of other makes, side by side."""
    quiet()
    console = Console(width=130, soft_wrap=True)
    console.print("  ".join(f"{name}: {value}" for name, value in environment().items()), highlight=False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dense, tokenizer, name = load_named(model)
    if only_sweep:
        sweep(dense.config, device, console)
        return
    shapes = [_shape(text) for text in shape or ("1x128", "8x32")]
    settings = Settings(device, torch.get_num_threads(), rounds, shapes)
    path = RESULTS / f"latency_{device}.json"
    told = _told(name, settings, round_to)
    unknown = [name for name in engine or () if name not in ENGINES]
    if unknown:
        raise typer.BadParameter(f"there is no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    names = engine or [name for name, kind in ENGINES.items() if not kind.by_name_only]
    rows = _before(path, told) if json_ else []
    absent = {one: why for one in names if (why := ENGINES[one].missing(device))}
    with tempfile.TemporaryDirectory() as folder:
        lengths = [tokens for _, tokens in shapes]
        models = candidates(dense, tokenizer, ratio or (0.2, 0.5), round_to, lengths, Path(folder))
        made, failed = _made(models, [one for one in names if one not in absent], settings.threads)
        for one in names:
            if one in absent | failed:
                console.print(f"{one}: {(absent | failed)[one]}", highlight=False, markup=False)
                continue
            found = list(measure(one, made, settings, lambda line: console.print(line, markup=False)))
            rows = [row for row in rows if row.engine != one] + found
            console.print(_table(one, found))
            if json_:
                _write(path, rows, told)


def _made(models: Iterable[Candidate], names: Sequence[str], threads: int) -> tuple[list[Candidate], dict[str, str]]:
    """The models, written for all engines as they come, and what went wrong by name of the engine."""
    writers, made = Writers(threads), []
    for candidate in models:
        made.append(candidate)
        for kind in (ENGINES[name] for name in names if ENGINES[name].writes):
            if candidate.runs_in(kind):
                writers.write(kind.name, candidate.source)
    return made, writers.wait()


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not sequences x tokens, as in 8x64")
    return int(found[1]), int(found[2])


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title=name)
    for heading in HEADING:
        table.add_column(heading, justify="left" if heading in HEADING[:2] else "right")
    for row in rows:
        table.add_row(*row.cells)
    return table


def _told(name: str, settings: Settings, round_to: int) -> dict[str, Any]:
    """What is measured, in plain values."""
    shapes = [list(shape) for shape in settings.shapes]
    return {"model": name, "round_to": round_to, **asdict(settings), "shapes": shapes}


def _before(path: Path, told: dict[str, Any]) -> list[Row]:
    """What was measured before of the same in the same environment."""
    data = json.loads(path.read_text()) if path.exists() else {}
    if (data.get("settings"), data.get("environment")) != (told, environment()):
        return []
    return read_rows(data)


def _write(path: Path, rows: Sequence[Row], told: dict[str, Any]) -> None:
    order = list(ENGINES)
    rows = sorted(rows, key=lambda row: order.index(row.engine))
    write_results(path, {"settings": told, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    app()
