"""Files of multiple-choice questions as tasks, a half of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fxprune.data.text import json_lines
from fxprune.evaluation import LocalTask

__all__ = ["local_tasks"]

SUFFIX = "\nAnswer:"


def local_tasks(files: Iterable[Path], half: str) -> dict[str, LocalTask]:
    """Files of questions as tasks by name.

    Args:
        files: JSONL of questions.
        half: `first` (to choose settings by) or `second` (to report).
    """
    tasks = {}
    for path in files:
        middle = sum(1 for _ in json_lines(path.read_text(encoding="utf-8"))) // 2
        start, stop = (middle, None) if half == "second" else (0, middle)
        tasks[path.stem] = LocalTask(path, suffix=SUFFIX, start=start, stop=stop)
    return tasks
