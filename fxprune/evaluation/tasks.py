"""Tasks of lm-evaluation-harness made of multiple-choice questions in a local file, without a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune.data.rows import json_lines
from fxprune.errors import EvaluationError

__all__ = ["LocalTask", "make_task", "read_questions"]

_SPLIT = "test"
_ROWS_NAMED = 3
"""Lines that an error names: enough to see whether one is broken or the file is of another kind."""
_EXPECTED = '{"query", "choices", "gold"} or {"context_options", "continuation", "gold"}'


@dataclass(frozen=True)
class LocalTask:
    """A JSONL file of multiple-choice questions.

    Each line is ``{"query": text, "choices": [text, ...], "gold": index}``: which choice follows the query; or
    ``{"context_options": [text, ...], "continuation": text, "gold": index}``: which context the text follows.

    Args:
        path: the file.
        suffix: put after each query, trailing white space of which is dropped first; for instance ``"\\nAnswer:"``.
        delimiter: between context and choice.
        start: the first line used, from 0.
        stop: the first line that is used no more; None for all.
    """

    path: str | Path
    suffix: str = ""
    delimiter: str = " "
    start: int = 0
    stop: int | None = None


def make_task(name: str, local: LocalTask) -> Any:
    """Return a task of lm-evaluation-harness named ``name``, with accuracy and, for choices, accuracy by choice length.

    Raises:
        EvaluationError: the file is missing, empty or holds a line that is no question.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = read_questions(local)
    by_context = "continuation" in rows[0]
    config: dict[str, Any] = {
        "task": name,
        "test_split": _SPLIT,
        "output_type": "multiple_choice",
        "target_delimiter": local.delimiter,
        "custom_dataset": lambda **_: {_SPLIT: Dataset.from_list(rows)},
        "metric_list": [_metric("acc")] if by_context else [_metric("acc"), _metric("acc_norm")],
        "num_fewshot": 0,
    }
    if by_context:
        config |= {"doc_to_text": _gold, "doc_to_choice": _contexts, "doc_to_target": _continuation}
    else:
        config |= {"doc_to_text": _query, "doc_to_choice": _choices, "doc_to_target": _gold}
    return ConfigurableTask(config=config)


def read_questions(local: LocalTask) -> list[dict[str, Any]]:
    """Return the questions of a file, checked, with the suffix in place.

    Raises:
        EvaluationError: as for :func:`make_task`; the message names the first lines at fault.
    """
    path = Path(local.path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"cannot be read: {error}", where=str(path), remedy="Pass the path of a file of questions, one on a line"
        ) from error
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    kinds: set[bool] = set()
    for number, line in json_lines(content):
        row, why = _question(line, local.suffix)
        if why:
            bad.append(f"line {number}: {why}")
        else:
            rows.append(row)
            kinds.add("continuation" in row)
    asked = rows[local.start : local.stop]
    if bad or len(kinds) > 1 or not asked:
        named = "; ".join(bad[:_ROWS_NAMED]) or ("two kinds of question" if kinds else "no questions")
        raise EvaluationError(
            f"{len(bad)} of {len(bad) + len(rows)} lines cannot be used: {named}",
            where=str(path),
            remedy=f"Each line must be {_EXPECTED}",
        )
    return asked


def _question(line: str, suffix: str) -> tuple[dict[str, Any], str]:
    """Return a checked question, or what is wrong with the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    if not isinstance(row, Mapping):
        return {}, f"a {type(row).__name__}, not an object"
    options = row.get("choices", row.get("context_options"))
    text = row.get("query") if "choices" in row else row.get("continuation")
    if not isinstance(options, list) or not isinstance(text, str) or not all(isinstance(o, str) and o for o in options):
        return {}, f"fields {sorted(row)}"
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(options):
        return {}, f"gold is {gold!r} of {len(options)} choices"
    if "choices" in row:
        return {"query": text.rstrip() + suffix if suffix else text, "choices": options, "gold": gold}, ""
    return {"contexts": options, "continuation": text, "gold": gold}, ""


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _query(doc: Mapping[str, Any]) -> str:
    return str(doc["query"])


def _choices(doc: Mapping[str, Any]) -> list[str]:
    return list(doc["choices"])


def _contexts(doc: Mapping[str, Any]) -> list[str]:
    return list(doc["contexts"])


def _continuation(doc: Mapping[str, Any]) -> str:
    return str(doc["continuation"])


def _gold(doc: Mapping[str, Any]) -> int:
    return int(doc["gold"])
