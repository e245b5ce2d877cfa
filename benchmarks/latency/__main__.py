"""Latency of dense and slim models, engine by engine: `make bench`; speed of aligned widths: `--sweep`."""

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

from benchmarks import common
from benchmarks.common import environment, load_named, write_results
from benchmarks.latency.candidates import Candidate, make_candidates
from benchmarks.latency.measure import HEADING, LatencyRow, Settings, measure, read_rows
from benchmarks.latency.workers import ENGINES, Writers, silence_packages
from fxprune.evaluation import measure_widths, write_widths

RESULTS = common.RESULTS


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model; else the demo model.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove; default 0.2 and 0.5.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Sequences x tokens; default 1x128 and 8x32.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Engines; default all except torch.compile.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, with two measurements of each model.")] = 4,
    round_to: Annotated[int, typer.Option(min=1, help="Widths of MLPs are multiples of this.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda; default cuda if there is a GPU.")] = "",
    only_sweep: Annotated[bool, typer.Option("--sweep", help="Measure the speed of aligned widths instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Keep results in benchmarks/results/.")] = False,
) -> None:
    """Time the dense model, slim models, and models pruned by other means, side by side."""
    silence_packages()
    console = Console(width=130, soft_wrap=True)
    console.print("  ".join(f"{name}: {value}" for name, value in environment().items()), highlight=False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dense, tokenizer, name = load_named(model)
    if only_sweep:
        _sweep(dense.config, device, console)
        return
    shapes = [_shape(text) for text in shape or ("1x128", "8x32")]
    settings = Settings(device, torch.get_num_threads(), rounds, shapes)
    path = RESULTS / f"latency_{device}.json"
    unknown = [name for name in engine or () if name not in ENGINES]
    if unknown:
        raise typer.BadParameter(f"there is no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    names = engine or [name for name, kind in ENGINES.items() if not kind.by_name_only]
    recorded: dict[str, Any] = {"model": name, "round_to": round_to, **asdict(settings)}
    recorded["shapes"] = [list(size) for size in shapes]
    rows = _read_rows(path, recorded) if json_ else []
    absent = {one: reason for one in names if (reason := ENGINES[one].missing(device))}
    with tempfile.TemporaryDirectory() as folder:
        lengths = [tokens for _, tokens in shapes]
        models = make_candidates(dense, tokenizer, ratio or (0.2, 0.5), round_to, lengths, Path(folder))
        made, failed = _write_all(models, [one for one in names if one not in absent], settings.threads)
        for one in names:
            if one in absent | failed:
                console.print(f"{one}: {(absent | failed)[one]}", highlight=False, markup=False)
                continue
            found = list(measure(one, made, settings, lambda line: console.print(line, markup=False)))
            rows = [row for row in rows if row.engine != one] + found
            console.print(_table(one, found))
            if json_:
                rows.sort(key=lambda row: list(ENGINES).index(row.engine))
                write_results(path, {"settings": recorded, "rows": [asdict(row) for row in rows]})


def _write_all(
    models: Iterable[Candidate], names: Sequence[str], threads: int
) -> tuple[list[Candidate], dict[str, str]]:
    """Write each model for all engines as soon as it is made; return the models, and errors by name of the engine."""
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


def _table(name: str, rows: Sequence[LatencyRow]) -> Table:
    table = Table(title=name)
    for heading in HEADING:
        table.add_column(heading, justify="left" if heading in HEADING[:2] else "right")
    for row in rows:
        table.add_row(*row.cells)
    return table


def _read_rows(path: Path, settings: dict[str, Any]) -> list[LatencyRow]:
    """Rows measured before with the same settings in the same environment."""
    data = json.loads(path.read_text()) if path.exists() else {}
    same = (data.get("settings"), data.get("environment")) == (settings, environment())
    return read_rows(data) if same else []


def _sweep(config: Any, device: str, console: Console) -> None:
    """Measure widths below those of a model, print the cost of multiples, and keep it for `round_to="auto"`."""
    widths = measure_widths(config.hidden_size, config.intermediate_size, device)
    table = Table("widths are multiples of", "time per column", title=f"{widths.device}, {config.hidden_size} wide")
    for multiple, cost in widths.costs.items():
        table.add_row(str(multiple), f"{cost:.3f}")
    console.print(table)
    console.print(f'round_to="auto" is {widths.best()} here; saved in {write_widths(widths)}', highlight=False)


if __name__ == "__main__":
    typer.run(main)
