"""Comparison of dense, pruned and recovered models, and of dense and slim at the end of a prune."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, variance
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from fxprune.data.built_in import can_generate, offline_docstrings
from fxprune.data.calibration import Calibration, HeldOut, batched, fixed_tokens, most_positions, token_input
from fxprune.data.samples import read_calibration
from fxprune.data.text import calibration_text, text_source
from fxprune.errors import EvaluationError, PositionsError
from fxprune.evaluation.generation import (
    Answers,
    Generation,
    answer_questions,
    compare_answers,
    mean_and_error,
    plain_questions,
)
from fxprune.evaluation.perplexity import (
    Perplexity,
    load_corpus,
    named_corpora,
    paired_perplexities,
    text_perplexity,
)
from fxprune.evaluation.speed import time_interleaved, timed_call
from fxprune.evaluation.tasks import LocalTask, TaskScore, named_tasks, zero_shot
from fxprune.graph.context import preserve_rng, wrap_errors
from fxprune.graph.counting import TOKENS, count_macs
from fxprune.graph.facts import facts_of
from fxprune.masking.masked_run import UntouchedRun
from fxprune.masking.parts import PartwiseModel
from fxprune.masking.teacher import run_logits
from fxprune.pipeline.arguments import flag, instance, numbers, one_of, refuse, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.pipeline.contract import shared as shared_finding
from fxprune.report.quality import GreedyAnswer, Quality, TextQuality, figures_markdown, figures_table
from fxprune.trace import trace
from fxprune.trace.inputs import private_twin
from fxprune.vocabulary.alignment import has_other_tokens


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model: perplexity by text, accuracy by task, and greedy answers; ``notes`` say what is left out."""

    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    generation: Generation | None = None
    answers: Answers | None = None
    notes: tuple[str, ...] = ()

    @property
    def average(self) -> float | None:
        """Mean accuracy over the tasks; None without tasks."""
        return sum(score.value for score in self.tasks.values()) / len(self.tasks) if self.tasks else None

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, without those of single windows and answers."""
        scores = {name: asdict(score) for name, score in self.tasks.items()}
        for score in scores.values():
            del score["correct"], score["answers"]
        perplexities = {name: asdict(value) for name, value in self.perplexities.items()}
        for value in perplexities.values():
            del value["losses"]
        generation = None if self.generation is None else asdict(self.generation)
        answers = {} if self.answers is None else dict(zip(self.answers.questions, self.answers.texts, strict=True))
        return {
            "perplexities": perplexities,
            "tasks": scores,
            "average": self.average,
            "generation": generation,
            "answers": answers,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The data of :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


class Reference:
    """A model that others are compared with, usually the dense one; its answers are generated once.

    Args:
        tokenizer: its tokenizer, if it is not that of the others.
    """

    def __init__(self, model: Any, answers: Answers | None = None, tokenizer: Any = None) -> None:
        self.model, self._answers, self.tokenizer = model, answers, tokenizer

    def compare(self, answers: Answers, tokenizer: Any, batch: int, track: Track) -> Generation:
        """Compare the answers of another model with those of this one, in the tokens of this one."""
        words = self.tokenizer or tokenizer
        if self._answers is None:
            self._answers = answer_questions(self.model, words, batch=batch, track=track)
        if words is not tokenizer and has_other_tokens(tokenizer, words):
            rows = words(list(answers.texts), add_special_tokens=False, verbose=False)["input_ids"]
            answers = replace(answers, ids=tuple(map(tuple, rows)))
        return compare_answers(answers.without(self._answers.too_long), self._answers.without(answers.too_long))


@wrap_errors("evaluate", "Pass a language model, its own tokenizer, and texts or tasks", EvaluationError)
def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    texts: str | Path | Iterable[Any] = ("wikitext2", "ptb"),
    tasks: str | Path | LocalTask | Sequence[str | Path | LocalTask] | Mapping[str, str | Path | LocalTask] = (),
    window: int = 256,
    stride: int | None = None,
    windows: int | None = None,
    questions: int | None = None,
    batch: int = 8,
    memory: str = "fast",
    reference: Any = None,
    generate: bool = False,
    track: Track = no_progress,
) -> Evaluation:
    """Measure the perplexity of a model on texts, its accuracy on tasks, and its greedy answers to plain questions.

    The processes of a torch process group share the windows of a text; all of them must call this function.

    Args:
        model: a Hugging Face model; for texts, any callable that takes ``input_ids=`` and returns logits; or the
            result of :func:`fxprune.prune`, whose model is measured, or its graph if it has no model.
        texts: ``"wikitext2"``, ``"ptb"``, ``"c4"`` and ``"owner/name"`` from the hub, files (.txt, .jsonl, .json), a
            ``datasets.Dataset`` or rows of one, or a mapping from names to these, to text itself, or to lists of texts;
            empty for none.
        tasks: names that lm-evaluation-harness knows (:data:`fxprune.evaluation.PAPER_TASKS` has the paper's), JSONL
            files of questions (see :class:`fxprune.evaluation.LocalTask`), or a mapping from names to these.
        window: tokens that the model sees at once; the default is the length that recovery trains on.
        stride: tokens between the starts of two windows; None for ``window``.
        windows: most windows of a text, evenly spaced; None for all.
        questions: most questions of a task, from its start; None for all.
        batch: sequences per call.
        memory: ``low`` runs all windows of a text through one part of the model after the other, so that weights in
            files are read once. The numbers are the same. Tasks always run on the whole model.
        reference: the dense model, or a :class:`Reference`, which may have a tokenizer of its own: predictions on texts
            and answers are compared with its own.
        generate: whether the model answers the questions of :func:`fxprune.evaluation.plain_questions`.
        track: shows progress on texts, as ``track(items, what, total)``.

    Raises:
        FxpruneError: a text or a task cannot be read; the message names it and the reason.
    """
    if hasattr(model, "graph_module") and not isinstance(model, type):
        model = model.model if model.model is not None else model.graph_module
    check_track(track)
    for name, most in (("questions", questions), ("windows", windows)):
        if most is not None:
            whole_number(name, most, least=1, error=EvaluationError)
    corpora, asked = named_corpora(texts), named_tasks(tasks)
    if not corpora and not asked and not flag("generate", generate):
        raise EvaluationError("no texts and no tasks", where="evaluate", remedy="Give at least one of them")
    one_of("memory", memory, ("fast", "low"))
    other = reference if isinstance(reference, Reference) else Reference(reference)
    options: dict[str, Any] = {"window": window, "stride": stride, "limit": windows, "batch": batch, "track": track}
    options |= {"reference": other.model, "reference_tokenizer": other.tokenizer}
    predicts = PartwiseModel(model) if memory == "low" and corpora else model
    loaded = {name: load_corpus(source) for name, source in corpora.items()}  # all of them, before one is measured
    perplexities = {name: text_perplexity(predicts, tokenizer, text, **options) for name, text in loaded.items()}
    scores = zero_shot(model, tokenizer, asked, limit=questions, batch=batch) if asked else {}
    if not generate:
        return Evaluation(perplexities, scores)
    try:
        answers = answer_questions(model, tokenizer, batch=batch, track=track)
        compared = compare_answers(answers) if reference is None else other.compare(answers, tokenizer, batch, track)
    except PositionsError as error:
        if not perplexities and not scores:
            raise
        return Evaluation(perplexities, scores, notes=(_unanswered(error),))
    return Evaluation(perplexities, scores, compared, answers, tuple(_notes_of(answers)))


def _unanswered(error: EvaluationError) -> str:
    return f"no question is answered: {error.what}"


def _notes_of(answers: Answers) -> Iterator[str]:
    """Yield a remark if a model had too few positions to answer all questions."""
    if left := len(answers.too_long):
        every = left + len(answers.questions)
        yield f"{left:,} of {every:,} questions are left out: the model has too few positions for them"


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

    def difference(self, name: str, task: str) -> tuple[float, float]:
        """Accuracy of a model minus that of the first one, and its standard error, from the same questions."""
        pairs = self._pairs(name, task)
        return mean_and_error([theirs.correct[i] - ours.correct[i] for ours, theirs, i in pairs])

    def flips(self, name: str, tasks: Sequence[str]) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Fractions of answers that differ from the first model's, with standard errors.

        Of the questions that the first model answers right, those that the other answers wrong; and of all questions,
        those with another choice. None if the tasks have no choices.

        Source: Dutta et al., "Accuracy is Not All You Need" (arXiv 2407.09141).
        """
        pairs = [pair for task in tasks for pair in self._pairs(name, task) if pair[0].answers and pair[1].answers]
        lost = [1 - theirs.correct[i] for ours, theirs, i in pairs if ours.correct[i]]
        changed = [float(ours.answers[i] != theirs.answers[i]) for ours, theirs, i in pairs]
        return (mean_and_error(lost), mean_and_error(changed)) if pairs else None

    def _pairs(self, name: str, task: str) -> list[tuple[TaskScore, TaskScore, int]]:
        ours = self.columns[0].evaluation.tasks[task]
        theirs = next(column.evaluation.tasks[task] for column in self.columns if column.name == name)
        return [(ours, theirs, i) for i in range(min(len(ours.correct), len(theirs.correct)))]

    @property
    def informed(self) -> tuple[str, ...]:
        """The tasks on which the first model beats guessing and the most frequent answer by two standard errors."""
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
            yield "  bits per byte", *(f"{v.bits_per_byte:.3f} ± {v.bits_per_byte_error:.3f}" for v in values)
            yield from _figures([value.divergence for value in values], _OF_DIVERGENCE)
        yield from self._task_rows()
        answers = [column.evaluation.generation for column in self.columns]
        yield from _figures(answers, _OF_ANSWERS)
        if any(answers):
            pairs = ("" if g is None else f"{g.distinct_1:.2f}, {g.distinct_2:.2f}" for g in answers)
            yield "  distinct tokens, pairs of tokens", *pairs

    def _task_rows(self) -> Iterator[tuple[str, ...]]:
        for task, score in self.columns[0].evaluation.tasks.items():
            scores = [column.evaluation.tasks[task] for column in self.columns]
            yield f"{task}, {score.metric}", *(f"{s.value:.3f} ± {s.standard_error:.3f}" for s in scores)
            if len(self.columns) > 1:
                apart = [self.difference(column.name, task) for column in self.columns[1:]]
                yield "  difference", "", *(f"{mean:+.3f} ± {error:.3f}" for mean, error in apart)
        if self.columns[0].evaluation.tasks:
            yield "average", *(f"{column.evaluation.average:.3f}" for column in self.columns)
        if self.informed:
            kept = [self.retained(column.name) for column in self.columns]
            guessed = [task for task in self.columns[0].evaluation.tasks if task not in self.informed]
            label = f"retained, except for {', '.join(guessed)}" if guessed else "retained"
            yield label, *(f"{k[0]:.1%} ± {k[1]:.1%}" if k else "" for k in kept)
        tasks = tuple(self.columns[0].evaluation.tasks)
        flips = [self.flips(column.name, tasks) for column in self.columns[1:]]
        for i, label in enumerate(("right answers lost", "choices changed")):
            if any(flips):
                yield label, "", *(f"{f[i][0]:.1%} ± {f[i][1]:.1%}" if f else "" for f in flips)

    def to_dict(self) -> dict[str, Any]:
        """All measurements as plain data."""
        columns = []
        for column in self.columns:
            kept = self.retained(column.name)
            numbers = {**asdict(column), "evaluation": column.evaluation.to_dict()}
            flips = {task: self.flips(column.name, [task]) for task in column.evaluation.tasks}
            apart = {task: self.difference(column.name, task) for task in column.evaluation.tasks}
            paired = {"difference": apart, "flips": flips, "retained": kept and kept[0]}
            columns.append({**numbers, **paired, "retained_standard_error": kept and kept[1]})
        return {"settings": dict(self.settings), "columns": columns, "retained_of": list(self.informed)}

    def to_json(self) -> str:
        """The data of :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The table in Markdown; a value after ± is one standard error."""
        return figures_markdown(self._head, self.rows())

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out of a column, after its name."""
        return tuple(f"{column.name}: {note}" for column in self.columns for note in column.evaluation.notes)

    def table(self, title: str = "") -> Table:
        """The table for a terminal."""
        return figures_table(self._head, self.rows(), title)

    @property
    def _head(self) -> list[str]:
        return ["", *(column.name for column in self.columns)]

    def plot(self, path: str | Path) -> Path:
        """Draw perplexities and accuracies with their standard errors to a file (.png, .svg, .pdf).

        Raises:
            EvaluationError: matplotlib is missing, or there is nothing to draw.
        """
        panels: list[tuple[str, dict[str, list[tuple[float, float]]]]] = []
        for title, kind in (("perplexity", "perplexities"), ("accuracy", "tasks")):
            measured = [getattr(column.evaluation, kind) for column in self.columns]
            values = {name: [(one[name].value, one[name].standard_error) for one in measured] for name in measured[0]}
            panels += [(title, values)] if values else []
        if not panels:
            raise EvaluationError("no perplexities and no tasks", where="plot", remedy="Measure some first")
        # room for the labels of the axis, and one inch for each group of bars
        figure = new_figure(1.5 + sum(1.5 + len(values) for _, values in panels), 4)
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


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib; sizes in inches.

    Raises:
        EvaluationError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        what = "matplotlib is not installed"
        raise EvaluationError(what, where="plot", remedy="pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


_OF_DIVERGENCE = (
    ("  perplexity over dense", "ratio", "{:.3f} ± {:.3f}"),
    ("  divergence, nats", "mean", "{:.3f} ± {:.3f}"),
    ("  divergence, 99th percentile", "percentile_99", "{:.2f}"),
    ("  same first token", "agreement", "{:.1%} ± {:.1%}"),
    ("  accepted as a draft", "acceptance", "{:.1%} ± {:.1%}"),
)
_OF_ANSWERS = (
    ("answers: words of the dense one's, F1", "overlap", "{:.1%} ± {:.1%}"),
    ("  tokens before they differ", "same_start", "{:.1%} ± {:.1%}"),
    ("  the same to the end", "same", "{:.1%} ± {:.1%}"),
    ("  4-grams repeated", "repetition", "{:.1%} ± {:.1%}"),
)


def _figures(found: Sequence[object], rows: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, ...]]:
    """Rows by label, name of the figure and format, without those that no model has."""
    for label, name, form in rows:
        values = [(getattr(one, name, None), getattr(one, f"{name}_error", None)) for one in found]
        if any(value is not None for value, _ in values):
            yield label, *("" if value is None else form.format(value, error) for value, error in values)


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
        column = as_column(name, model, evaluate(model, tokenizer, **options))
        macs = count_macs(trace(model).graph_module)
        columns.append(replace(column, macs=macs, latency_ms=median(times[name]) * 1e3))
    measured = {"latency_shape": list(latency_shape), "rounds": rounds, "threads": torch.get_num_threads()}
    return Comparison(tuple(columns), {**measured, **(settings or {})})


def as_column(name: str, model: nn.Module, evaluation: Evaluation) -> Column:
    """Column of a model that was evaluated, without MACs and latency."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Column(name, parameters, None, memory, None, evaluation)


WINDOW = 256
"""Tokens that the models see at once, as in ``fxprune eval``."""

WINDOWS = 12
"""Windows of a text: three thousand tokens tell a good result from a bad one, and take seconds."""

_FEWEST = 4
"""Windows below which errors are not known."""

ANSWER = 24
"""Tokens of the greedy answer."""

BUILT_IN = "docstrings of Python"
"""Name of the text that is measured on if there is no other."""


def graph_predictor(graph_module: fx.GraphModule, *, shared: bool = False) -> Callable[..., Tensor]:
    """A function from token ids ``(batch, tokens)`` to logits that runs a graph and writes to none of its tensors.

    A ``shared`` graph is that of the dense model of a sweep, which predicts the same text again.
    """

    def run(input_ids: Tensor) -> Tensor:
        inputs = batched(read_calibration(input_ids, graph_module), graph_module)
        return run_logits(UntouchedRun(graph_module), inputs).to(input_ids.device)

    def predict(input_ids: Tensor) -> Tensor:
        return shared_finding(graph_module, ("logits", *input_ids.flatten().tolist()), lambda: run(input_ids))

    return predict if shared else run


def measure_quality(
    dense: Any,
    slim: Any,
    tokenizer: Any,
    text: str | os.PathLike[str] | None = None,
    *,
    dense_tokenizer: Any = None,
    speakers: tuple[Any, Any] | None = None,
    pruned: fx.GraphModule | None = None,
    window: int = WINDOW,
    track: Track = no_progress,
) -> Quality:
    """Measure a slim model beside the dense one: predictions on a text, and the greedy answer to a question.

    Args:
        dense: a Hugging Face model, or any callable that takes ``input_ids=`` and returns logits, as is ``slim``.
        tokenizer: of both, or of the slim model.
        text: a file of text, or the name of a data set; None for docstrings of Python's library, which also take the
            place of a text that has too few windows left.
        dense_tokenizer: of the dense model, if it has other tokens.
        speakers: the dense and the slim model to generate the answer; None for no answer.
        pruned: the slim graph, whose facts tell which samples the prune used: windows with a part of one are left out.

    Raises:
        FxpruneError: a model cannot be run on the text, or all of the text was used.
    """
    seen = () if pruned is None else _samples_used(pruned)
    options: dict[str, Any] = {"window": window, "limit": WINDOWS, "seen": seen, "track": track, "batch": 1}
    options["reference_tokenizer"] = dense_tokenizer
    name = BUILT_IN if text is None else text_source(text)
    found: tuple[Perplexity, Perplexity] | None = None
    answers: tuple[GreedyAnswer, ...] = ()
    notes = []
    with preserve_rng():
        if text is not None:
            try:
                content = calibration_text(text, tokenizer)
                found = paired_perplexities(slim, dense, tokenizer, content, **options)
                why = f"{found[0].windows:,} windows are left that the prune did not use, and {_FEWEST} are needed"
            except EvaluationError as error:  # it is too short, or all of it was used
                why = error.what
        if found is None or found[0].windows < _FEWEST:
            notes += [] if text is None else [f"quality was measured on {BUILT_IN} in place of {name}: {why}"]
            name = BUILT_IN
            found = paired_perplexities(slim, dense, tokenizer, offline_docstrings(), **options)
        tokenizers = (dense_tokenizer or tokenizer, tokenizer)
        if speakers is not None:
            try:
                answers = _answers(*zip(speakers, tokenizers, strict=True))
            except EvaluationError as error:
                notes.append(_unanswered(error))
    return Quality((_text_quality(name, *found),), answers, tuple(notes))


def _samples_used(graph_module: fx.GraphModule) -> list[Tensor]:
    """Token ids of the samples that a prune used for calibration or early stopping."""
    facts, name = facts_of(graph_module), token_input(graph_module)
    known = [fact for fact in (facts.get(Calibration), facts.get(HeldOut)) if fact is not None]
    return [sample.inputs[name] for fact in known for sample in fact.samples] if name else []


def window_of(model: Any, graph_module: fx.GraphModule | None = None) -> int:
    """Tokens of a window: :data:`WINDOW`, or the longest sequence that a model takes if that is shorter.

    A graph, if it is measured in place of the model, may run on one number of tokens alone, which it then is.
    """
    fixed = None if graph_module is None else fixed_tokens(graph_module)
    return fixed or min(WINDOW, most_positions(model) or WINDOW)


def quality_of(dense: Evaluation, slim: Evaluation) -> Quality:
    """The quality of a slim model, from evaluations of both on the same texts, with their first answers."""
    texts = tuple(
        _text_quality(name, dense.perplexities[name], value)
        for name, value in slim.perplexities.items()
        if value.divergence is not None
    )
    notes = tuple(dict.fromkeys((*dense.notes, *slim.notes)))
    if dense.answers is None or slim.answers is None:
        return Quality(texts, (), notes)
    pair = dense.answers.without(slim.answers.too_long), slim.answers.without(dense.answers.too_long)
    return Quality(texts, _first_answer(*pair), notes)


def _text_quality(text: str, dense: Perplexity, slim: Perplexity) -> TextQuality:
    apart = slim.divergence
    assert apart is not None  # there was a reference
    return TextQuality(
        text=text,
        windows=slim.windows,
        window=slim.window,
        tokens=slim.predicted,
        perplexity=((dense.value, dense.standard_error), (slim.value, slim.standard_error)),
        bits_per_byte=(
            (dense.bits_per_byte, dense.bits_per_byte_error),
            (slim.bits_per_byte, slim.bits_per_byte_error),
        ),
        ratio=(apart.ratio, apart.ratio_error),
        divergence=(apart.mean, apart.mean_error),
        agreement=(apart.agreement, apart.agreement_error),
    )


def _answers(dense: tuple[Any, Any], slim: tuple[Any, Any]) -> tuple[GreedyAnswer, ...]:
    """Answers of both models to a question, each with its tokenizer; empty if one cannot generate."""
    if not (can_generate(dense[0]) and can_generate(slim[0])):
        return ()

    def answers(model: Any, tokenizer: Any) -> Answers:
        return answer_questions(token_twin(model), tokenizer, plain_questions()[:1], tokens=ANSWER)

    return _first_answer(shared_finding(None, ("answers", *dense), lambda: answers(*dense)), answers(*slim))


def token_twin(model: Any) -> Any:
    """A copy to run of a model of token ids, with its weights, in case it writes to itself."""
    return private_twin(model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def _first_answer(dense: Answers, slim: Answers) -> tuple[GreedyAnswer, ...]:
    """The first answers, as a report can show them: without line breaks and control characters; empty if none."""
    if not dense.questions:
        return ()
    shown = ("".join(sign if sign.isprintable() else " " for sign in one.texts[0]) for one in (dense, slim))
    return (GreedyAnswer(dense.questions[0], *(" ".join(text.split()) for text in shown)),)
