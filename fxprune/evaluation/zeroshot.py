"""Accuracy on multiple-choice tasks without examples, by lm-evaluation-harness on the model as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation.tasks import LocalTask, make_task, read_questions
from fxprune.graph.attempts import clear_errors
from fxprune.graph.silence import quiet
from fxprune.pipeline.arguments import refuse, whole_number

__all__ = ["PAPER_TASKS", "TaskScore", "check_tasks", "named_tasks", "zero_shot"]

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
