"""What the slim models that were kept are worth on questions, beside the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.quality.entries import order_of
from benchmarks.quality.measure import Row, kept_in
from benchmarks.questions import local_tasks
from fxprune.evaluation.comparison import Column, Comparison, measure_model

__all__ = ["ask", "kept_models"]


def kept_models(keep: Path, rows: Iterable[Row]) -> dict[str, Path]:
    """The folders of slim models that are there, by entry and ratio, as tables have them; of several draws the first.

    Args:
        keep: Folder that slim models were saved into.
        rows: What was measured.
    """
    found: dict[str, Path] = {}
    for row in sorted(rows, key=lambda row: (row.ratio, order_of(row.entry), row.draw)):
        folder = kept_in(keep, row.entry, row.ratio, row.draw)
        if folder.is_dir():
            found.setdefault(f"{row.entry}, {row.ratio:.0%}", folder)
    return found


def ask(
    dense: Any,
    tokenizer: Any,
    models: Mapping[str, Path],
    files: Iterable[Path],
    questions: int,
    dtype: torch.dtype,
) -> Comparison:
    """Ask the dense model and slim ones the same questions, of the second half of each file.

    Args:
        dense: The dense model; it is asked in `dtype`, and left so.
        tokenizer: Of all of them.
        models: Folders of slim models, by name.
        files: JSONL of questions.
        questions: The most of a file.
        dtype: What they are asked in.
    """
    tasks = local_tasks(files, "second")

    def measured() -> Iterator[Column]:
        yield measure_model("dense", dense.to(dtype=dtype), tokenizer, texts=(), tasks=tasks, questions=questions)
        for name, folder in models.items():
            slim: Any = fxprune.from_pretrained(folder)
            yield measure_model(name, slim.to(dtype=dtype), tokenizer, texts=(), tasks=tasks, questions=questions)

    settings = {"questions": questions, "half": "second", "measured_in": str(dtype)}
    return Comparison(tuple(measured()), settings)
