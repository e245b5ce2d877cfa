"""Zero-shot accuracy on multiple-choice tasks, by lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import transformers

from fxprune.data.named import unused_name
from fxprune.data.rows import json_lines
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.graph.context import eval_mode, quiet, wrap_errors
from fxprune.pipeline.arguments import refuse, whole_number


@dataclass(frozen=True)
class LocalTask:
    """A JSONL file of multiple-choice questions.

    Each line is ``{"query": text, "choices": [text, ...], "gold": index}``: which choice follows the query; or
    ``{"context_options": [text, ...], "continuation": text, "gold": index}``: which context the text follows.

    Args:
        path: the file.
        suffix: text after each query, whose trailing white space is removed first; for instance ``"\\nAnswer:"``.
        delimiter: text between context and choice.
        start: index of the first question, from 0.
        stop: index after the last question; None for all.
    """

    path: str | Path
    suffix: str = ""
    delimiter: str = " "
    start: int = 0
    stop: int | None = None


def make_task(name: str, local: LocalTask) -> Any:
    """A task of lm-evaluation-harness with accuracy and, for choices, accuracy normalised by their length."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = read_questions(local)
    by_context = "continuation" in rows[0]
    metrics = ["acc"] if by_context else ["acc", "acc_norm"]
    config: dict[str, Any] = {
        "task": name,
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": local.delimiter,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "num_fewshot": 0,
    }
    fields = ("gold", "contexts", "continuation") if by_context else ("query", "choices", "gold")
    for key, field_name in zip(("doc_to_text", "doc_to_choice", "doc_to_target"), fields, strict=True):
        config[key] = itemgetter(field_name)
    return ConfigurableTask(config=config)


def read_questions(local: LocalTask) -> list[dict[str, Any]]:
    """Read and check the questions of a file, and append the suffix; an error names the first lines at fault."""
    path = Path(local.path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Pass the path of a file of questions, one per line"
        raise EvaluationError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error
    read = [(number, *_question(line, local.suffix)) for number, line in json_lines(content)]
    bad = [f"line {number}: {why}" for number, _, why in read if why]
    rows = [row for _, row, why in read if not why]
    kinds = {"continuation" in row for row in rows}
    asked = rows[local.start : local.stop]
    if bad or len(kinds) > 1 or not asked:
        # three lines tell a broken line from a file of another kind
        named = "; ".join(bad[:3]) or ("two kinds of question" if kinds else "no questions")
        what = f"{len(bad)} of {len(bad) + len(rows)} lines cannot be used: {named}"
        remedy = 'Each line must be {"query", "choices", "gold"} or {"context_options", "continuation", "gold"}'
        raise EvaluationError(what, where=str(path), remedy=remedy)
    return asked


def _question(line: str, suffix: str) -> tuple[dict[str, Any], str]:
    """The question of a line, or the reason why it is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    if not isinstance(row, Mapping):
        return {}, f"not an object, but {type(row).__name__}"
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


PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of LLM-Pruner (arXiv 2305.11627, table 1)."""

Task = str | Path | LocalTask

_RESAMPLES = 100
"""For standard errors of metrics other than means, which have theirs in closed form.

A hundred resamples give one to 7%; the harness's own 100,000 take minutes.
"""

METRICS = ("acc_norm", "acc", "exact_match")
"""Accuracies in order of preference; ``acc_norm`` is by the likelihood of a choice over its number of characters."""

_LONGEST = 300
"""Characters of the harness's own messages that are repeated; some list every task there is."""


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of a model on a task.

    Args:
        metric: the first of :data:`METRICS` that the task has.
        value: fraction of the questions, in [0, 1].
        standard_error: standard error of ``value``, from the harness.
        correct: question by question, whether the answer was right by ``metric``; for paired comparison.
        answers: question by question, the number of the choice by ``metric``; empty for questions without choices.
        chance: accuracy of guessing: the mean of 1 / number of choices; 0 for questions without choices.
        constant: accuracy of the answer that is right most often, if all questions have the same choices; else 0.
    """

    metric: str
    value: float
    standard_error: float
    samples: int
    others: Mapping[str, float] = field(default_factory=dict)
    correct: tuple[float, ...] = ()
    answers: tuple[int, ...] = ()
    chance: float = 0.0
    constant: float = 0.0

    @property
    def informed(self) -> bool:
        """Whether the model beats guessing, and the same answer to all questions, by more than two standard errors."""
        return self.value - 2 * self.standard_error > max(self.chance, self.constant)


def named_tasks(tasks: Task | Sequence[Task] | Mapping[str, Task]) -> dict[str, Task]:
    """Tasks by name: names that lm-evaluation-harness knows, its YAML files, JSONL files, or a mapping to these.

    A folder stands for the files in it, in the order of their names.
    """
    wanted = "names of tasks, files of questions, folders of these, or a mapping from names to these"
    given: Any = [tasks] if isinstance(tasks, str | Path | LocalTask) else tasks
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise refuse("tasks", given, wanted, EvaluationError)
    items: list[Task] = list(given.values() if isinstance(given, Mapping) else given)
    for item in items:
        if not isinstance(item, str | Path | LocalTask):
            raise refuse("tasks", item, wanted, EvaluationError)
    if isinstance(given, Mapping):
        return {name: _as_file(task) for name, task in given.items()}
    named: dict[str, Task] = {}
    for item in items:
        path = Path(item.path if isinstance(item, LocalTask) else item)
        if os.path.isdir(path):
            found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", *_YAML))
            if not found:
                raise EvaluationError("holds no .jsonl or .yaml file", where=str(path), remedy="Name another folder")
            named |= named_tasks(found)
        elif path.suffix in _YAML:
            named[_yaml_name(path)] = path  # the harness finds it by its name
        else:
            task = _as_file(item)
            named[unused_name(path.stem, named) if isinstance(task, LocalTask) else str(task)] = task
    return named


def _as_file(task: Task) -> Task:
    """A task as it is; the path of a file of questions as :class:`LocalTask`."""
    if isinstance(task, LocalTask):
        return task
    suffix = Path(task).suffix
    is_there = isinstance(task, Path) or os.path.isfile(task)
    is_file = suffix in (".jsonl", ".json") or (is_there and suffix not in _YAML)
    return LocalTask(task) if is_file else task


_YAML = (".yaml", ".yml")


def _yaml_name(path: Path) -> str:
    """The name that a YAML file of lm-evaluation-harness gives its task; tags in it are functions of Python."""
    try:
        found = re.search(r"^task:[ \t]*['\"]?([^\s'\"#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot be read: {error}", where=str(path), remedy="Name a readable file") from error
    if found is None:
        remedy = "Give the name of one task, as in lm-evaluation-harness's own files"
        raise EvaluationError("has no entry `task:` with a name", where=str(path), remedy=remedy)
    return found[1]


def check_tasks(tasks: Task | Sequence[Task] | Mapping[str, Task]) -> None:
    """Refuse tasks that cannot be run, as for :func:`named_tasks`, before a model is loaded for them."""
    with quiet(logging.WARNING):
        _harness()
    named = named_tasks(tasks)
    for task in named.values():
        if isinstance(task, LocalTask):
            read_questions(task)
    names = [name for name, task in named.items() if not isinstance(task, LocalTask)]
    known = _task_manager(named).all_tasks if names else ()
    for name in names:
        if name not in known:
            raise UnknownNameError("task", name, known)


def _task_manager(named: Mapping[str, Task]) -> Any:
    """The harness's index of the tasks that are not files of questions."""
    paths = [Path(task) for task in named.values() if not isinstance(task, LocalTask)]
    own = [str(path.resolve().parent) for path in paths if path.suffix in _YAML]
    return _index(len(own) < len(paths), tuple(dict.fromkeys(own)))


@cache
def _index(hub: bool, folders: tuple[str, ...]) -> Any:
    """The harness's index of tasks in folders; with those on the hub it takes seconds to build."""
    with quiet(logging.WARNING):
        return _harness().TaskManager(include_defaults=hub, include_path=list(folders) or None)


def _harness() -> Any:
    """The module of lm-evaluation-harness that finds tasks."""
    try:
        import lm_eval.tasks as tasks
    except ImportError as error:
        what = f"the package `lm-eval` is not installed ({error})"
        raise EvaluationError(what, where="tasks", remedy="pip install 'fxprune[eval]'") from error
    return tasks


@wrap_errors("tasks", "Pass a language model, its own tokenizer, and tasks by name or as files", EvaluationError)
def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Task | Sequence[Task] | Mapping[str, Task] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, TaskScore]:
    """Accuracy of a model on tasks, by name; of a group of tasks that the harness knows, on each of them.

    Prompts have no examples, unless a task of the harness asks for some.

    Args:
        model: a Hugging Face model; its mode is restored.
        tokenizer: its tokenizer; a copy is used.
        tasks: as for :func:`named_tasks`; the paper's seven are fetched from the hub.
        limit: most questions of a task, from its start; None for all.
        batch: sequences per call.
    """
    named = named_tasks(tasks)
    batch = whole_number("batch", batch, least=1, error=EvaluationError)
    if limit is not None:
        limit = whole_number("questions", limit, least=1, error=EvaluationError)
    if not isinstance(model, transformers.PreTrainedModel):
        what = f"tasks need a Hugging Face model, not a {type(model).__name__}"
        remedy = "Pass result.model; if it is None, report.model_reasons says why"
        raise EvaluationError(what, where="model", remedy=remedy)
    with quiet(logging.WARNING), eval_mode(model):
        try:
            loaded = _harness_tasks(named)
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=_with_end(tokenizer, model), batch_size=batch),
                tasks=list(loaded.values()),
                task_manager=_task_manager(named),
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                random_seed=None,  # the harness leaves random number generators alone
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(
                f"{type(error).__name__}: {str(error)[:_LONGEST]}",
                where=f"tasks {sorted(named)}",
                remedy="Names must be known to lm-eval and their data on the hub or in the cache; "
                "local questions go in as a .jsonl file",
            ) from error
    return {name: _score(name, task, found) for name, task in loaded.items()}


def _with_end(tokenizer: Any, model: Any) -> Any:
    """A copy of a tokenizer with an end-of-text token, which the harness begins and ends texts with."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.eos_token_id is not None:
        return tokenizer
    own = model.generation_config.eos_token_id if model.can_generate() else None
    end = own[0] if isinstance(own, list) else own
    end = tokenizer.bos_token_id if end is None or end >= len(tokenizer) else end
    if end is None:
        what = "it has no token for the end of a text, nor for its beginning, and lm-eval needs one"
        remedy = "Set tokenizer.eos_token to the token that ended texts in training"
        shell = "Set eos_token in its tokenizer_config.json to the token that ended texts in training"
        raise EvaluationError(what, where="tokenizer", remedy=remedy, shell=shell)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def _harness_tasks(named: Mapping[str, Task]) -> dict[str, Any]:
    """Tasks of the harness by name, with those of a group in place of the group."""
    get_task_dict = _harness().get_task_dict
    found: dict[str, Any] = {}
    for name, task in named.items():
        if isinstance(task, LocalTask):
            found[name] = make_task(name, task)
            continue
        spelled = _yaml_name(Path(task)) if Path(task).suffix in _YAML else str(task)
        for own, one in _leaves(get_task_dict([spelled], _task_manager(named))):
            key = name if own == spelled else own
            if key != own:
                one.set_config("task", key)
            found[key] = one
    for name, task in found.items():
        measured = list(task.aggregation())
        if not set(METRICS) & set(measured):
            what = f"it measures {', '.join(measured)}, and no accuracy"
            raise EvaluationError(what, where=f"task {name}", remedy=f"Name tasks that measure {' or '.join(METRICS)}")
    return found


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tasks in groups, and in groups of these, with their names."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield name, task


def _chosen(sample: Mapping[str, Any], options: Sequence[str], *, normalised: bool) -> int:
    """The option of the largest log-likelihood, divided by the characters of the option if ``normalised``."""
    scores = [float(result[0]) for result in sample["filtered_resps"][: len(options)]]
    if normalised:
        scores = [score / max(len(option), 1) for score, option in zip(scores, options, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def _score(name: str, task: Any, found: Mapping[str, Any]) -> TaskScore:
    numbers: Mapping[str, Any] = found["results"][name]
    metric = next(one for one in METRICS if one in task.aggregation())
    way = next(key for key in numbers if key.startswith(f"{metric},")).removeprefix(f"{metric},")
    plain = {key.removesuffix(f",{way}"): value for key, value in numbers.items() if key.endswith(f",{way}")}
    every = (sample for sample in found["samples"][name] if sample["filter"] == way)
    samples = sorted(every, key=lambda sample: int(sample["doc_id"]))
    others = {key: float(v) for key, v in plain.items() if not key.endswith("_stderr") and key != metric}
    error = plain.get(f"{metric}_stderr")
    options: list[Sequence[str]] = []
    if task.OUTPUT_TYPE == "multiple_choice":
        options = [task.doc_to_choice(sample["doc"]) for sample in samples]
    pairs = zip(samples, options, strict=bool(options))
    return TaskScore(
        metric=metric,
        value=float(plain[metric]),
        standard_error=float(error) if isinstance(error, float) else 0.0,
        samples=len(samples),
        others=others,
        correct=tuple(float(sample[metric]) for sample in samples),
        answers=tuple(_chosen(sample, those, normalised=metric == "acc_norm") for sample, those in pairs),
        chance=sum(1 / len(those) for those in options) / len(options) if options else 0.0,
        constant=_constant([sample["target"] for sample in samples], options),
    )


def _constant(targets: Sequence[Any], options: Sequence[Sequence[str]]) -> float:
    """The largest fraction of questions with the same right choice, if all have the same choices, as yes and no.

    The harness gives the right choice by number or in words.
    """
    if len(options) < 2 or any(list(those) != list(options[0]) for those in options):
        return 0.0
    words = (options[0][target] if isinstance(target, int) else target for target in targets)
    return max(Counter(word for word in words if word in options[0]).values(), default=0) / len(targets)
