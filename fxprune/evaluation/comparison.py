"""Comparison of dense, pruned and recovered models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, variance
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fxprune.errors import EvaluationError
from fxprune.evaluation.perplexity import Perplexity, load_corpus, named_corpora, text_perplexity
from fxprune.evaluation.speed import time_interleaved, timed_call
from fxprune.evaluation.tasks import LocalTask, TaskScore, named_tasks, zero_shot
from fxprune.graph.context import wrap_errors
from fxprune.graph.counting import TOKENS, count_macs
from fxprune.masking.parts import PartwiseModel
from fxprune.pipeline.arguments import instance, numbers, one_of, refuse, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.trace import trace

__all__ = ["Column", "Comparison", "Evaluation", "compare_models", "evaluate", "measure_model"]


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model: perplexity by name of the text, accuracy by name of the task."""

    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    @property
    def average(self) -> float | None:
        """Mean accuracy over the tasks; None without tasks."""
        return sum(score.value for score in self.tasks.values()) / len(self.tasks) if self.tasks else None

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, without the single answers."""
        scores = {name: asdict(score) for name, score in self.tasks.items()}
        for score in scores.values():
            del score["correct"]
        perplexities = {name: asdict(value) for name, value in self.perplexities.items()}
        return {"perplexities": perplexities, "tasks": scores, "average": self.average}

    def to_json(self) -> str:
        """The data of :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


@wrap_errors("evaluate", "Pass a language model, its own tokenizer, and texts or tasks", EvaluationError)
def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    texts: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = ("wikitext2", "ptb"),
    tasks: str | Path | LocalTask | Sequence[str | Path | LocalTask] | Mapping[str, str | Path | LocalTask] = (),
    window: int = 256,
    stride: int | None = None,
    windows: int | None = None,
    questions: int | None = None,
    batch: int = 8,
    memory: str = "fast",
    track: Track = no_progress,
) -> Evaluation:
    """Measure the perplexity of a model on texts and its accuracy on tasks.

    The processes of a torch process group share the windows of a text; all of them must call this function.

    Args:
        model: a Hugging Face model; for texts, any callable that takes ``input_ids=`` and returns logits; or the
            result of :func:`fxprune.prune`, whose model is measured, or its graph if it has no model.
        texts: ``"wikitext2"``, ``"ptb"`` (both from the hub), files (.txt, .jsonl, .json), or a mapping from names to
            these or to text itself; empty for none.
        tasks: names that lm-evaluation-harness knows (:data:`fxprune.evaluation.PAPER_TASKS` has the paper's), JSONL
            files of questions (see :class:`fxprune.evaluation.LocalTask`), or a mapping from names to these.
        window: tokens that the model sees at once; the default is the length that recovery trains on.
        stride: tokens between the starts of two windows; None for ``window``.
        windows: most windows of a text, evenly spaced; None for all.
        questions: most questions of a task, from its start; None for all.
        batch: sequences per call.
        memory: ``low`` runs all windows of a text through one part of the model after the other, so that weights in
            files are read once. The numbers are the same. Tasks always run on the whole model.
        track: shows progress on texts, as ``track(items, what, total)``.

    Raises:
        FxpruneError: a text or a task cannot be read; the message names it and the reason.
    """
    if hasattr(model, "graph_module") and not isinstance(model, type):
        model = model.model if model.model is not None else model.graph_module
    check_track(track)
    if questions is not None:
        whole_number("questions", questions, least=1, error=EvaluationError)
    corpora, asked = named_corpora(texts), named_tasks(tasks)
    if not corpora and not asked:
        raise EvaluationError("no texts and no tasks", where="evaluate", remedy="Give at least one of them")
    one_of("memory", memory, ("fast", "low"))
    predicts = PartwiseModel(model) if memory == "low" and corpora else model
    loaded = {name: load_corpus(source) for name, source in corpora.items()}
    perplexities = {
        name: text_perplexity(
            predicts, tokenizer, text, window=window, stride=stride, limit=windows, batch=batch, track=track
        )
        for name, text in loaded.items()
    }
    scores = zero_shot(model, tokenizer, tasks, limit=questions, batch=batch) if asked else {}
    return Evaluation(perplexities, scores)


@dataclass(frozen=True)
class Column:
    """Measurements of one model.

    Args:
        name: ``dense``, ``pruned``, ``recovered``, ...
        macs: multiply-accumulates of one sample of :data:`fxprune.graph.counting.TOKENS` tokens; None if not
            counted.
        memory: bytes of parameters and buffers.
        latency_ms: median time of a forward pass in milliseconds; None if not measured.
        evaluation: perplexities and accuracies.
    """

    name: str
    parameters: int
    macs: int | None
    memory: int
    latency_ms: float | None
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """Models side by side, the first one as baseline, with the protocol and other remarks in ``settings``."""

    columns: tuple[Column, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def retained(self, name: str) -> tuple[float, float] | None:
        """Average accuracy of a model as a fraction of the first one's, and its standard error.

        The average is over the tasks in :attr:`informed`: guessing cannot lose accuracy. The error is that of a ratio
        over the same questions, by linearisation, so models that err on the same questions can be distinguished with
        fewer of them. None without such a task.
        """
        base = {task: self.columns[0].evaluation.tasks[task] for task in self.informed}
        other = next(column.evaluation.tasks for column in self.columns if column.name == name)
        if not base or not base.keys() <= other.keys():
            return None
        total = sum(score.value for score in base.values())
        ratio = sum(other[task].value for task in base) / total
        spread = 0.0
        for task, score in base.items():
            rest = [b - ratio * a for a, b in zip(score.correct, other[task].correct, strict=True)]
            spread += variance(rest) / len(rest) if len(rest) > 1 else 0.0
        return ratio, spread**0.5 / total

    @property
    def informed(self) -> tuple[str, ...]:
        """The tasks on which the first model beats guessing by more than a standard error."""
        return tuple(task for task, score in self.columns[0].evaluation.tasks.items() if score.informed)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows of the table as text: a name, and a value for each model."""
        yield "parameters", *(f"{column.parameters:,}" for column in self.columns)
        if self.columns[0].macs is not None:
            yield f"MACs at {TOKENS} tokens", *(f"{column.macs:,}" for column in self.columns)
        yield "memory, MB", *(f"{column.memory / 1e6:.1f}" for column in self.columns)
        shape = self.settings.get("latency_shape", ())
        label = f"latency, ms at {' x '.join(map(str, shape))}" if shape else "latency, ms"
        if self.columns[0].latency_ms is not None:
            yield label, *(f"{column.latency_ms:.1f}" for column in self.columns)
        for text in self.columns[0].evaluation.perplexities:
            values = [column.evaluation.perplexities[text] for column in self.columns]
            yield f"perplexity, {text}", *(f"{v.value:.2f} ± {v.standard_error:.2f}" for v in values)
        for task, score in self.columns[0].evaluation.tasks.items():
            scores = [column.evaluation.tasks[task] for column in self.columns]
            yield f"{task}, {score.metric}", *(f"{s.value:.3f} ± {s.standard_error:.3f}" for s in scores)
        if self.columns[0].evaluation.tasks:
            yield "average", *(f"{column.evaluation.average:.3f}" for column in self.columns)
        if self.informed:
            kept = [self.retained(column.name) for column in self.columns]
            guessed = [task for task in self.columns[0].evaluation.tasks if task not in self.informed]
            label = f"retained, except for {', '.join(guessed)}" if guessed else "retained"
            yield label, *(f"{k[0]:.1%} ± {k[1]:.1%}" if k else "" for k in kept)

    def to_dict(self) -> dict[str, Any]:
        """All measurements as plain data."""
        columns = []
        for column in self.columns:
            kept = self.retained(column.name)
            numbers = {**asdict(column), "evaluation": column.evaluation.to_dict()}
            columns.append({**numbers, "retained": kept and kept[0], "retained_standard_error": kept and kept[1]})
        return {"settings": dict(self.settings), "columns": columns, "retained_of": list(self.informed)}

    def to_json(self) -> str:
        """The data of :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The table in Markdown; a value after ± is one standard error."""
        heading = ["", *(column.name for column in self.columns)]
        lines = ["| " + " | ".join(heading) + " |", "|---" + "|---:" * len(self.columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows())]) + "\n"

    def table(self, title: str = "") -> Table:
        """The table for a terminal."""
        table = Table("", title=title or None)
        for column in self.columns:
            table.add_column(column.name, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def plot(self, path: str | Path) -> Path:
        """Draw perplexities and accuracies with their standard errors to a file (.png, .svg, .pdf).

        Raises:
            EvaluationError: matplotlib is missing, or there is nothing to draw.
        """
        whole = [column.evaluation for column in self.columns]
        texts = {
            n: [(e.perplexities[n].value, e.perplexities[n].standard_error) for e in whole]
            for n in whole[0].perplexities
        }
        tasks = {n: [(e.tasks[n].value, e.tasks[n].standard_error) for e in whole] for n in whole[0].tasks}
        panels = [(name, values) for name, values in (("perplexity", texts), ("accuracy", tasks)) if values]
        if not panels:
            raise EvaluationError("no perplexities and no tasks", where="plot", remedy="Measure some first")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            what = "matplotlib is not installed"
            raise EvaluationError(what, where="plot", remedy="pip install matplotlib") from error
        # inches: room for the labels of the axis, and one for each group of bars
        figure = Figure(figsize=(1.5 + sum(1.5 + len(values) for _, values in panels), 4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[1 + len(values) for _, values in panels])[0]
        for panel, (title, values) in zip(axes, panels, strict=True):
            width = 0.8 / len(self.columns)  # leaves a fifth of the distance between groups blank
            for index, column in enumerate(self.columns):
                places = [group + (index - (len(self.columns) - 1) / 2) * width for group in range(len(values))]
                heights, errors = zip(*(group[index] for group in values.values()), strict=True)
                panel.bar(places, heights, width * 0.9, yerr=errors, label=column.name, capsize=2)
            panel.set_xticks(range(len(values)), list(values))
            panel.set_title(title)
            panel.spines[["top", "right"]].set_visible(False)
        bars, names = axes[0].get_legend_handles_labels()
        figure.legend(bars, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize="small")
        figure.savefig(path)
        return Path(path)


@wrap_errors("compare_models", "Pass language models, and the tokenizer of all of them", EvaluationError)
def compare_models(
    models: Mapping[str, Any],
    tokenizer: Any,
    *,
    latency_shape: tuple[int, int] = (1, 128),
    rounds: int = 5,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Comparison:
    """Measure several models in the same way.

    Args:
        models: Hugging Face models by name, the dense one first.
        latency_shape: samples and tokens of the timed forward pass; one prompt of common length by default.
        rounds: measurements of each latency, see :func:`fxprune.evaluation.speed.time_interleaved`.
    """
    wanted = "models by name, as in {'dense': model, 'pruned': result.model}"
    given: Any = models
    if not isinstance(given, Mapping) or not given:
        raise refuse("models", models, wanted, EvaluationError)
    for name, model in models.items():
        instance(f"models[{name!r}]", model, nn.Module, "a Hugging Face model", EvaluationError)
    if len(numbers("latency_shape", latency_shape, "(samples, tokens)")) != 2 or not all(latency_shape):
        raise refuse("latency_shape", latency_shape, "(samples, tokens)", EvaluationError)
    rounds = whole_number("rounds", rounds, least=1, error=EvaluationError)
    with torch.inference_mode():
        jobs = {}
        for name, model in models.items():
            ids = torch.zeros(latency_shape, dtype=torch.long, device=model.device)
            jobs[name] = timed_call(partial(model, input_ids=ids, use_cache=False))
        times = time_interleaved(jobs, rounds)
    columns = []
    for name, model in models.items():
        column = measure_model(name, model, tokenizer, **options)
        macs = count_macs(trace(model).graph_module)
        columns.append(replace(column, macs=macs, latency_ms=median(times[name]) * 1e3))
    measured = {"latency_shape": list(latency_shape), "rounds": rounds, "threads": torch.get_num_threads()}
    return Comparison(tuple(columns), {**measured, **(settings or {})})


def measure_model(name: str, model: Any, tokenizer: Any, **options: Any) -> Column:
    """Measure quality and size of one model, without MACs and latency; ``options`` are for :func:`fxprune.evaluate`."""
    tensors = [*model.parameters(), *model.buffers()]
    return Column(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=None,
        memory=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        latency_ms=None,
        evaluation=evaluate(model, tokenizer, **options),
    )
