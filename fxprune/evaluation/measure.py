"""Perplexity and zero-shot accuracy of one model, in one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxprune.errors import EvaluationError
from fxprune.evaluation.corpora import load_corpus, named_corpora
from fxprune.evaluation.in_blocks import InBlocks
from fxprune.evaluation.perplexity import Perplexity, text_perplexity
from fxprune.evaluation.tasks import LocalTask
from fxprune.evaluation.zeroshot import TaskScore, named_tasks, zero_shot
from fxprune.graph.attempts import clear_errors
from fxprune.pipeline.arguments import one_of, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be worth.

    Args:
        perplexities: by name of the text.
        tasks: accuracy by name of the task.
    """

    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    @property
    def average(self) -> float | None:
        """The mean accuracy over the tasks; None where none was run."""
        return sum(score.value for score in self.tasks.values()) / len(self.tasks) if self.tasks else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single answers, as plain data."""
        scores = {name: dataclasses.asdict(score) for name, score in self.tasks.items()}
        for score in scores.values():
            del score["correct"]
        perplexities = {name: dataclasses.asdict(value) for name, value in self.perplexities.items()}
        return {"perplexities": perplexities, "tasks": scores, "average": self.average}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


@clear_errors("evaluate", "Pass a language model, its own tokenizer, and texts or tasks", EvaluationError)
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
    """Measure the perplexity of ``model`` on texts and its accuracy on tasks.

    Several processes of one process group of torch share the windows of a text; all of them have to call.

    Args:
        model: a Hugging Face model, or, for texts alone, whatever takes ``input_ids=`` and returns logits; or the
            result of :func:`fxprune.prune`, of which the model is measured, else the graph.
        tokenizer: the model's tokenizer.
        texts: ``"wikitext2"``, ``"ptb"`` (both from the hub), files (.txt, .jsonl, .json), or a mapping from names to
            these or to text itself; empty for none.
        tasks: names that lm-evaluation-harness knows (:data:`fxprune.evaluation.PAPER_TASKS` has the paper's), JSONL
            files of questions (see :class:`fxprune.evaluation.LocalTask`), or a mapping from names to these.
        window: tokens the model sees at once; the default is the length that recovery trains on.
        stride: tokens between two windows; None for ``window``.
        windows: the most windows of a text, spread over it; None for all.
        questions: the most questions of a task, from its start; None for all.
        batch: sequences in one call.
        memory: ``low``: texts go through a part of the model after the other, all windows through each, so that weights
            in files that memory cannot hold are read once. The numbers are the same. Tasks are asked of the model as it
            is.
        track: shows progress on texts, as ``track(items, what, total)``.

    Raises:
        FxpruneError: a text or a task cannot be read; the message says which, and why.
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
    predicts = InBlocks(model) if memory == "low" and corpora else model
    loaded = {name: load_corpus(source) for name, source in corpora.items()}
    perplexities = {
        name: text_perplexity(
            predicts, tokenizer, text, window=window, stride=stride, limit=windows, batch=batch, track=track
        )
        for name, text in loaded.items()
    }
    scores = zero_shot(model, tokenizer, tasks, limit=questions, batch=batch) if asked else {}
    return Evaluation(perplexities, scores)
