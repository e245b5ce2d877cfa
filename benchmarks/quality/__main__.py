"""The command: `python -m benchmarks.quality`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks.demo_model import load_named
from benchmarks.environment import write_results
from benchmarks.quality.entries import entries
from benchmarks.quality.measure import Protocol, Row, measure, measure_dense, texts_of, told
from benchmarks.quality.tasks import ask, kept_models
from fxprune.cli.allocator import keep_freed
from fxprune.cli.console import widened

__all__ = ["RESULTS", "TASKS", "app"]

RESULTS = Path(__file__).parent.parent / "results" / "quality.json"
TASKS = RESULTS.with_name("quality_tasks.json")

app = typer.Typer(add_completion=False)


def _missing(
    done: Sequence[Row], ratios: Sequence[float], draws: int, names: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """What is not measured yet, the first draw of everything first."""
    seen = {(row.entry, row.ratio, row.draw) for row in done}
    for draw in range(draws):
        for ratio in ratios:
            for entry in entries(names):
                alike = draw > 0 and entry.samples == 0  # it draws none
                if not alike and (entry.name, ratio, draw) not in seen:
                    yield entry, ratio, draw


def _read(path: Path, protocol: Protocol) -> list[Row]:
    """Rows measured before under the same protocol.

    Raises:
        BadParameter: they were measured under another, and would be lost.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["protocol"] != asdict(protocol):
        told = f"{path.name} has rows of another protocol, {Protocol(**found['protocol'])}"
        raise typer.BadParameter(f"{told}; move it away or leave --json out")
    return [Row(**row) for row in found["rows"]]


def _questions(data: Path | None, keep: Path | None, questions: int) -> list[Path]:
    """Files of questions, where any are to be asked.

    Raises:
        BadParameter: there are none, or no place where slim models are kept.
    """
    files = sorted((data / "zeroshot").glob("*.jsonl")) if data is not None and questions else []
    if questions and (keep is None or not files):
        raise typer.BadParameter("--questions needs --keep FOLDER, and --data FOLDER with zeroshot/*.jsonl")
    return files


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder of texts and zeroshot/*.jsonl; else built-in text.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model; else the demo model.")] = None,
    calibration: Annotated[str, typer.Option(help="File of the folder to calibrate on.")] = "c4_sample.jsonl",
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions of the parameters; 0.2, 0.35 and 0.5.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of entries; all of them without.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of calibration samples.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="The most calibration samples.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of one.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to measure on.")] = 60,
    window: Annotated[int, typer.Option(min=2, help="Tokens of one.")] = 128,
    questions: Annotated[
        int, typer.Option(min=0, help="Ask the dense model and those in --keep so many of each file; 0 for none.")
    ] = 0,
    keep: Annotated[Path | None, typer.Option(help="Save each slim model into a folder of its own in here.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Ask in bfloat16: faster where the CPU has it.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help=f"Keep results in results/{RESULTS.name}, answers beside it.")
    ] = False,
) -> None:
    """Prune by every recipe, and by the default one with one thing changed, and measure what is left."""
    asked = _questions(data, keep, questions)
    keep_freed()
    console = widened(Console())
    dense, tokenizer, name = load_named(model)
    source = "the general part of the built-in text" if data is None else calibration
    protocol = Protocol(name, source, samples, tokens, windows, window)
    texts = texts_of(tokenizer, data, calibration, protocol)
    say: Callable[[str], None] = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    say(str(protocol))
    rows = _read(RESULTS, protocol) if json_ else []
    rows = rows or [measure_dense(dense, texts)]
    for row in rows:
        say(told(row, rows[0]))
    ratios = ratio or [0.2, 0.35, 0.5]
    for entry, part, draw in _missing(rows, ratios, draws, only or ()):
        try:
            rows.append(measure(dense, tokenizer, texts, entry, part, draw, protocol, keep))
        except fxprune.FxpruneError as error:
            say(f"{part:.0%}, draw {draw}: {entry.name}: {error}")
            continue
        say(told(rows[-1], rows[0]))
        if json_:
            write_results(RESULTS, {"protocol": asdict(protocol), "rows": [asdict(row) for row in rows]})
    if keep is not None and asked:
        models = kept_models(keep, [row for row in rows if row.ratio in ratios and (not only or row.entry in only)])
        found = ask(dense, tokenizer, models, asked, questions, torch.bfloat16 if bf16 else torch.float32)
        console.print(found.table(f"{name}, up to {questions} questions of the second half of each file"))
        if json_:
            write_results(TASKS, found.to_dict())


if __name__ == "__main__":
    app()
