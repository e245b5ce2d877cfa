"""Processor time of a sweep beside that of the same prunes one by one: `python -m benchmarks.sweep`.

The models of both are compared bit for bit. Time of the processor leaves out that of other programs; use one thread, as
in `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks.common import load_demo_model
from fxprune.data.built_in import built_in_samples


def measure(
    model: Any, samples: Any, ratios: Sequence[float], recipes: Sequence[Any], **options: Any
) -> tuple[dict[str, float], float]:
    """Seconds of the processor for each prune by its name, and for the sweep of all of them.

    Raises:
        AssertionError: a model of the sweep is not that of its own prune.
    """
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        start = time.process_time()
        swept = fxprune.sweep(
            model, samples, out=Path(place) / "sweep", ratio=ratios, recipe=recipes, keep="all", **options
        )
        whole = time.process_time() - start
        for row, (recipe, ratio) in zip(swept.rows, itertools.product(recipes, ratios), strict=True):
            start = time.process_time()
            result = fxprune.prune(model, samples, recipe=recipe, ratio=ratio, **options)
            result.save_pretrained(Path(place) / row.name, options["tokenizer"])
            alone[row.name] = time.process_time() - start
            same, own = (fxprune.from_pretrained(Path(place) / name / row.name).state_dict() for name in ("sweep", ""))
            assert all(torch.equal(value, own[name]) for name, value in same.items()), row.name
    return alone, whole


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of built-in text, in place of the recipe's own.")
    ] = None,
) -> None:
    """Print a row for each prune of the demo model, and the part of their time that the sweep takes."""
    model, tokenizer = load_demo_model()
    given = None if samples is None else built_in_samples(tokenizer, 128, samples)
    found, whole = measure(
        model, given, ratio or [0.1, 0.2, 0.35], recipe or ["fast", "balanced"], tokenizer=tokenizer, progress=False
    )
    table = Table("", "processor time, s", title=f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.0f}")
    table.add_section()
    table.add_row("one by one", f"{sum(found.values()):.0f}")
    table.add_row("as a sweep", f"{whole:.0f} ({whole / sum(found.values()):.0%})")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
