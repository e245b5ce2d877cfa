"""Accuracy on multiple-choice tasks, by lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxprune.data.text import json_lines
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.graph.context import clear_errors, quiet
from fxprune.pipeline.arguments import refuse, whole_number

__all__ = [
    "PAPER_TASKS",
    "LocalTask",
    "TaskScore",
    "check_tasks",
    "make_task",
    "named_tasks",
    "read_questions",
    "zero_shot",
]

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


PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of LLM-Pruner (arXiv 2305.11627, table 1)."""

Task = str | Path | LocalTask

_RESAMPLES = 100
"""For standard errors of metrics other than means, which have theirs in closed form.

A hundred resamples give one to 7%; the harness's own 100,000 take minutes.
"""

_LONGEST = 300
"""Characters of the harness's own messages that are repeated; some list every task there is."""


@dataclass(frozen=True)
class TaskScore:
    """How often a model chose the right answer.

    Args:
        metric: ``acc_norm`` (likelihood by length of the choice) where the task has it, else ``acc``.
        value: fraction of the questions, in [0, 1].
        standard_error: of ``value``, from the harness.
        samples: questions asked.
        others: further metrics of the task.
        correct: question by question, whether the answer was right by ``metric``; for paired comparison.
        chance: what guessing would give: the mean of one by the number of choices; 0 where there are none to choose
            from.
    """

    metric: str
    value: float
    standard_error: float
    samples: int
    others: Mapping[str, float] = field(default_factory=dict)
    correct: tuple[float, ...] = ()
    chance: float = 0.0

    @property
    def informed(self) -> bool:
        """Whether the model does better than guessing, by more than one standard error."""
        return self.value - self.standard_error > self.chance


def named_tasks(tasks: Task | Sequence[Task] | Mapping[str, Task]) -> dict[str, Task]:
    """Return tasks by name.

    Args:
        tasks: names that lm-evaluation-harness knows, JSONL files (by path or :class:`LocalTask`), alone or in a
            sequence; or a mapping from names of your own.
    """
    wanted = "names of tasks, JSONL files of questions, or a mapping from names to these"
    given: Any = tasks
    if isinstance(given, bytes) or not isinstance(given, str | Path | LocalTask | Iterable):
        raise refuse("tasks", given, wanted, EvaluationError)
    for item in given.values() if isinstance(given, Mapping) else given if isinstance(given, Iterable) else ():
        if not isinstance(item, str | Path | LocalTask):
            raise refuse("tasks", item, wanted, EvaluationError)
    if isinstance(tasks, Mapping):
        return dict(tasks)
    items: list[Task] = [tasks] if isinstance(tasks, str | Path | LocalTask) else list(tasks)
    named: dict[str, Task] = {}
    for item in items:
        path = Path(item.path if isinstance(item, LocalTask) else item)
        named[path.stem if _is_file(item) else str(item)] = item
    return named


def check_tasks(tasks: Task | Sequence[Task] | Mapping[str, Task]) -> None:
    """Refuse tasks that cannot be asked, before a model is read for them.

    Args:
        tasks: as for :func:`named_tasks`.

    Raises:
        UnknownNameError: the harness has no task of this name; the nearest is suggested.
        EvaluationError: the harness is missing, or a file holds something else than questions.
    """
    with _installed(), quiet(logging.WARNING):
        from lm_eval.tasks import TaskManager
    named = named_tasks(tasks)
    for task in named.values():
        if _is_file(task):
            read_questions(task if isinstance(task, LocalTask) else LocalTask(task))
    names = [str(task) for task in named.values() if not _is_file(task)]
    known = TaskManager().all_tasks if names else ()
    for name in names:
        if name not in known:
            raise UnknownNameError("task", name, known)


@contextmanager
def _installed() -> Iterator[None]:
    """Say what to install where the harness is missing."""
    try:
        yield
    except ImportError as error:
        raise EvaluationError(
            f"the package `lm-eval` is not installed ({error})",
            where="tasks",
            remedy="pip install 'fxprune[eval]'",
        ) from error


@clear_errors("tasks", "Pass a language model, its own tokenizer, and tasks by name or as files", EvaluationError)
def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Task | Sequence[Task] | Mapping[str, Task] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, TaskScore]:
    """Measure the accuracy of a model on tasks.

    Args:
        model: a Hugging Face model; it is asked as it is, where it is, and left in its mode.
        tokenizer: its tokenizer; a copy is used.
        tasks: as for :func:`named_tasks`; the paper's seven are fetched from the hub.
        limit: the most questions of a task, from its start; None for all.
        batch: sequences in one call.

    Raises:
        EvaluationError: the harness is missing, a task is unknown or cannot be loaded, or the model is not a Hugging
            Face one.
    """
    named = named_tasks(tasks)
    batch = whole_number("batch", batch, least=1, error=EvaluationError)
    if limit is not None:
        limit = whole_number("questions", limit, least=1, error=EvaluationError)
    if not isinstance(model, PreTrainedModel):
        raise EvaluationError(
            f"tasks need a Hugging Face model, not a {type(model).__name__}",
            where="model",
            remedy="Pass result.model; where there is none, report.model_reasons says why",
        )
    mode = model.training
    with quiet(logging.WARNING):
        try:
            found = _run(model, copy.deepcopy(tokenizer), named, limit, batch)
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(
                f"{type(error).__name__}: {str(error)[:_LONGEST]}",
                where=f"tasks {sorted(named)}",
                remedy="Names must be known to lm-eval and their data on the hub or in the cache; "
                "local questions go in as a .jsonl file",
            ) from error
        finally:
            model.train(mode)
    return {name: _score(name, found) for name in named}


def _run(model: Any, tokenizer: Any, named: Mapping[str, Task], limit: int | None, batch: int) -> Mapping[str, Any]:
    """Run the harness, leaving random number generators alone; return what it found."""
    with _installed():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    hub = any(not _is_file(task) for task in named.values())
    found: Mapping[str, Any] = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=[_task(name, task) for name, task in named.items()],
        task_manager=TaskManager(include_defaults=hub),
        limit=limit,
        bootstrap_iters=_RESAMPLES,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return found


def _is_file(task: Task) -> bool:
    return not isinstance(task, str) or task.endswith((".jsonl", ".json"))


def _task(name: str, task: Task) -> Any:
    if not _is_file(task):
        return str(task)
    return make_task(name, task if isinstance(task, LocalTask) else LocalTask(task))


def _score(name: str, found: Mapping[str, Any]) -> TaskScore:
    numbers: Mapping[str, Any] = found["results"][name]
    plain = {key.removesuffix(",none"): value for key, value in numbers.items() if key.endswith(",none")}
    metric = "acc_norm" if "acc_norm" in plain else "acc"
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    others = {key: float(v) for key, v in plain.items() if not key.endswith("_stderr") and key != metric}
    error = plain.get(f"{metric}_stderr")
    return TaskScore(
        metric=metric,
        value=float(plain[metric]),
        standard_error=float(error) if isinstance(error, float) else 0.0,
        samples=len(samples),
        others=others,
        correct=tuple(float(sample[metric]) for sample in samples),
        chance=_chance([len(sample["arguments"]) for sample in samples]),
    )


def _chance(choices: Sequence[int]) -> float:
    """What guessing gives, by the number of choices of each question; 0 where one has none."""
    return sum(1 / n for n in choices) / len(choices) if choices and min(choices) > 1 else 0.0
