"""Command line of the quality benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks import common
from benchmarks.common import load_named, write_results
from benchmarks.quality.entries import entries
from benchmarks.quality.measure import (
    Protocol,
    QualityRow,
    ask_questions,
    describe,
    measure,
    measure_dense,
    read_texts,
    saved_models,
)
from fxprune.cli.console import widened
from fxprune.cli.process import keep_freed

__all__ = ["RESULTS", "TASKS", "app"]

RESULTS = common.RESULTS / "quality.json"
TASKS = RESULTS.with_name("quality_tasks.json")

app = typer.Typer(add_completion=False)


def _missing(
    done: Sequence[QualityRow], ratios: Sequence[float], draws: int, names: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Entries, ratios and draws that are not measured yet, draw by draw."""
    seen = {(row.entry, row.ratio, row.draw) for row in done}
    for draw in range(draws):
        for ratio in ratios:
            for entry in entries(names):
                repeated = draw > 0 and entry.samples == 0  # draws differ in samples alone
                if not repeated and (entry.name, ratio, draw) not in seen:
                    yield entry, ratio, draw


def _read(path: Path, protocol: Protocol) -> list[QualityRow]:
    """Rows measured before with the same protocol.

    Raises:
        BadParameter: They were measured with another protocol, and would be overwritten.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["protocol"] != asdict(protocol):
        other = f"{path.name} has rows of another protocol, {Protocol(**found['protocol'])}"
        raise typer.BadParameter(f"{other}; move it away or leave --json out")
    return [QualityRow(**row) for row in found["rows"]]


def _questions(data: Path | None, keep: Path | None, questions: int) -> list[Path]:
    """Files of questions, if any are to be asked.

    Raises:
        BadParameter: There are no files, or no folder of saved slim models.
    """
    files = sorted((data / "zeroshot").glob("*.jsonl")) if data is not None and questions else []
    if questions and (keep is None or not files):
        raise typer.BadParameter("--questions needs --keep FOLDER, and --data FOLDER with zeroshot/*.jsonl")
    return files


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder of texts and zeroshot/*.jsonl; else built-in text.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model, or GGUF file; else the demo model.")] = None,
    calibration: Annotated[str, typer.Option(help="File of the folder to calibrate on.")] = "c4_sample.jsonl",
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove; default 0.2, 0.35 and 0.5.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of entries; default all.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of calibration samples.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Most calibration samples.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to measure on.")] = 60,
    window: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions of each file to ask the dense model and those in --keep.")
    ] = 0,
    keep: Annotated[Path | None, typer.Option(help="Save each slim model in a subfolder of this folder.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Ask in bfloat16: faster where the CPU has it.")] = False,
    json_: Annotated[
        bool,
        typer.Option(
            "--json", help=f"Keep results in results/{RESULTS.name}, answers beside it; of another model by name."
        ),
    ] = False,
) -> None:
    """Prune by every recipe, and by the default recipe with one change, and measure perplexity."""
    asked = _questions(data, keep, questions)
    keep_freed()
    console = widened(Console())
    dense, tokenizer, name = load_named(model)
    source = "the general part of the built-in text" if data is None else calibration
    protocol = Protocol(name, source, samples, tokens, windows, window)
    texts = read_texts(tokenizer, data, calibration, protocol)
    report = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    report(str(protocol))
    results, answers = (path if model is None else path.with_stem(f"{path.stem}-{name}") for path in (RESULTS, TASKS))
    rows = _read(results, protocol) if json_ else []
    rows = rows or [measure_dense(dense, texts)]
    for row in rows:
        report(describe(row, rows[0]))
    ratios = ratio or [0.2, 0.35, 0.5]
    for entry, part, draw in _missing(rows, ratios, draws, only or ()):
        try:
            rows.append(measure(dense, tokenizer, texts, entry, part, draw, protocol, keep))
        except fxprune.FxpruneError as error:
            report(f"{part:.0%}, draw {draw}: {entry.name}: {error}")
            continue
        report(describe(rows[-1], rows[0]))
        if json_:
            write_results(results, {"protocol": asdict(protocol), "rows": [asdict(row) for row in rows]})
    if keep is not None and asked:
        models = saved_models(keep, [row for row in rows if row.ratio in ratios and (not only or row.entry in only)])
        found = ask_questions(dense, tokenizer, models, asked, questions, torch.bfloat16 if bf16 else torch.float32)
        console.print(found.table(f"{name}, up to {questions} questions of the second half of each file"))
        if json_:
            write_results(answers, found.to_dict())


if __name__ == "__main__":
    app()
