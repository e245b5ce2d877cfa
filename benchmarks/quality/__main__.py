"""Command line of the quality benchmark."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks import common
from benchmarks.common import load_named, write_results
from benchmarks.quality.entries import Entry, entries, is_current
from benchmarks.quality.measure import Bench, ask_questions, describe, saved_models, with_earlier
from benchmarks.quality.reference import KeptReference
from benchmarks.quality.rows import DENSE, Protocol, QualityRow, read_rows
from benchmarks.quality.texts import kept_back, read_texts
from fxprune.cli.console import keep_freed, widened
from fxprune.offload.prefetch import has_bf16

RESULTS = common.RESULTS / "quality.json"
TASKS = RESULTS.with_name("quality_tasks.json")

ALL = "all"


def _count(name: str, text: str, least: int) -> int | None:
    """A number from the command line; None for ``all``.

    Raises:
        BadParameter: It is neither.
    """
    if text == ALL:
        return None
    if not text.isdecimal() or int(text) < least:
        raise typer.BadParameter(f"{name} takes a number from {least} on, or {ALL!r}, not {text!r}")
    return int(text)


def _missing(
    done: Sequence[QualityRow], ratios: Sequence[float], draws: int, names: Sequence[str]
) -> Iterator[tuple[Entry, float, int]]:
    """Entries, ratios and draws that are not measured yet, draw by draw."""
    seen = {(row.entry, row.ratio, row.draw) for row in done}
    for draw in range(draws):
        for ratio in ratios:
            for entry in entries(names):
                repeated = draw > 0 and entry.samples == 0  # there are no samples to draw
                if not repeated and (entry.name, ratio, draw) not in seen:
                    yield entry, ratio, draw


def _questions(data: Path | None, keep: Path | None, questions: int | None) -> list[Path]:
    """Files of questions, if any are to be asked.

    Raises:
        BadParameter: There are no files, or no folder of saved slim models.
    """
    if questions == 0:
        return []
    files = [] if data is None else [file for end in ("jsonl", "yaml") for file in (data / "zeroshot").glob(f"*.{end}")]
    if keep is None or not files:
        raise typer.BadParameter("--questions needs --keep FOLDER, and --data FOLDER with zeroshot/*.jsonl or *.yaml")
    return sorted(files)


def _names(only: Sequence[str]) -> Sequence[str]:
    """Names of entries, checked.

    Raises:
        BadParameter: There is no such entry.
    """
    known = [DENSE, *(entry.name for entry in entries())]
    for name in only:
        if name not in known:
            raise typer.BadParameter(f"--only {name!r} is no entry; there are: {'; '.join(known)}")
    return only


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of texts and zeroshot/*.jsonl; else built-in text.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Further files to measure on.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model, or GGUF file; else the demo model.")] = None,
    smaller: Annotated[list[Path] | None, typer.Option(help="Smaller models of the family, to measure beside.")] = None,
    calibration: Annotated[str, typer.Option(help="File of the folder to calibrate on.")] = "c4_sample.jsonl",
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove; default 0.2, 0.35 and 0.5.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of entries; dense for that model alone.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of calibration samples.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Most calibration samples.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    windows: Annotated[str, typer.Option(help="Windows of the shortest length at the start of each text, or all.")] = (
        "60"
    ),
    window: Annotated[list[int] | None, typer.Option(help="Tokens of a window; default 128, 512 and 2048.")] = None,
    fewest: Annotated[int, typer.Option(min=1, help="Windows of each other length, at least.")] = 4,
    questions: Annotated[
        str, typer.Option(help="Questions of each file to ask the dense model and those in --keep, or all.")
    ] = "0",
    keep: Annotated[
        Path | None, typer.Option(help="Keep slim models, and the dense one's predictions, in this folder.")
    ] = None,
    carry: Annotated[
        bool,
        typer.Option(
            "--carry",
            help="Measure nothing; keep rows of earlier versions of recipes that choose the same plan as today's.",
        ),
    ] = False,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--float32", help="Type to measure in; default bfloat16 where the CPU has it.")
    ] = None,
    json_: Annotated[
        bool,
        typer.Option(
            "--json", help=f"Keep results in results/{RESULTS.name}, answers beside it; of another model by name."
        ),
    ] = False,
) -> None:
    """Prune by every recipe, and by the default recipe with one change, and measure predictions on texts."""
    number, most = _count("--windows", windows, 1), _count("--questions", questions, 0)
    asked, names = _questions(data, keep, most), _names(only or ())
    keep_freed()
    console = widened(Console())
    dense, tokenizer, name = load_named(model)
    measured = torch.bfloat16 if (has_bf16(dense.device) if bf16 is None else bf16) else torch.float32
    protocol = Protocol(
        name,
        "the general part of the built-in text" if data is None else calibration,
        samples,
        tokens,
        kept_back(data, calibration),
        number,
        tuple(sorted(set(window or (128, 512, 2048)))),
        fewest,
        str(measured).removeprefix("torch."),
    )
    texts = read_texts(tokenizer, data, calibration, protocol, text or ())
    report = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    report(str(protocol))
    results, answers = (path if model is None else path.with_stem(f"{path.stem}-{name}") for path in (RESULTS, TASKS))
    rows = read_rows(json.loads(results.read_text())) if json_ and results.exists() else []
    ratios = ratio or [0.2, 0.35, 0.5]

    def add(row: QualityRow) -> None:
        rows[:] = [*(each for each in rows if each.key != row.key), row]
        if json_:
            write_results(results, {"rows": [each.to_dict() for each in rows]})

    with tempfile.TemporaryDirectory() as folder:
        converted: Any = copy.deepcopy(dense)
        reference = KeptReference(converted.to(dtype=measured), keep / DENSE if keep else Path(folder))
        bench = Bench(dense, tokenizer, texts, protocol, reference, keep)
        # a row without one of the texts is measured anew, which costs little where its model was kept
        done = [row for row in rows if row.protocol == protocol and row.texts.keys() >= texts.heldout.keys()]
        if carry:
            _carry(
                bench, [row for row in done if row.ratio in ratios and (not names or row.entry in names)], add, report
            )
            return
        _measure(bench, done, smaller or (), list(_missing(done, ratios, draws, names)), add, report)
    if keep is not None and asked:
        own = [row for row in rows if row.protocol == protocol and row.ratio in ratios]
        models = saved_models(keep, [row for row in own if not names or row.entry in names])
        compared = ask_questions(dense, tokenizer, models, asked, most, measured, keep)
        console.print(compared.table(f"{name}, all questions" if most is None else f"{name}, up to {most} questions"))
        if json_:
            write_results(answers, with_earlier(compared.to_dict(), answers))


def _carry(
    bench: Bench, rows: Sequence[QualityRow], add: Callable[[QualityRow], None], report: Callable[[str], None]
) -> None:
    """Rows of earlier versions of recipes with the passes of today, where these choose the same plan."""
    for row in rows:
        if row.entry == DENSE or is_current(row.entry, row.ratio, row.draw, row.passes):
            continue
        for entry in entries([row.entry]):
            same = bench.carried(row, entry)
            if same is not None:
                add(same)
            found = "another plan, or another treatment" if same is None else "the same plan"
            report(f"{row.ratio:.0%}, draw {row.draw}: {row.entry}: {found}")


def _measure(
    bench: Bench,
    done: Sequence[QualityRow],
    smaller: Sequence[Path],
    missing: Sequence[tuple[Entry, float, int]],
    add: Callable[[QualityRow], None],
    report: Callable[[str], None],
) -> None:
    """Missing rows, measured one by one, the dense model first; each is added to the results and printed."""
    known = {row.entry: row for row in done}
    dense = known.get(DENSE)
    for row in done:
        report(describe(row, dense or row))
    if dense is None:
        dense = bench.dense()
        add(dense)
        report(describe(dense, dense))
    for path in smaller:
        model: Any
        model, tokenizer, name = load_named(path)
        if name not in known:
            row = bench.whole(name, model.to(dtype=bench.reference.model.dtype), model, tokenizer)
            add(row)
            report(describe(row, dense))
    for entry, ratio, draw in missing:
        try:
            row = bench.pruned(entry, ratio, draw)
        except fxprune.FxpruneError as error:
            report(f"{ratio:.0%}, draw {draw}: {entry.name}: {error}")
            continue
        add(row)
        report(describe(row, dense))


if __name__ == "__main__":
    typer.run(main)
