"""Quality at the end of a prune: the slim model beside the dense one, on text that the prune did not use."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.data.built_in import can_generate, offline_docstrings
from fxprune.data.calibration import Calibration, HeldOut, batched, token_input
from fxprune.data.samples import read_calibration
from fxprune.data.text import calibration_text, text_source
from fxprune.errors import EvaluationError
from fxprune.evaluation.comparison import Evaluation
from fxprune.evaluation.generation import Answers, answer_questions, plain_questions
from fxprune.evaluation.perplexity import Perplexity, paired_perplexities
from fxprune.graph.context import preserve_rng
from fxprune.graph.facts import facts_of
from fxprune.masking.masked_run import UntouchedRun
from fxprune.masking.teacher import run_logits
from fxprune.pipeline.contract import Track, no_progress
from fxprune.pipeline.sharing import shared_tensor
from fxprune.report.quality import GreedyAnswer, Quality, TextQuality
from fxprune.trace.inputs import alias_twin, written_parameters

__all__ = ["ANSWER", "BUILT_IN", "WINDOW", "WINDOWS", "graph_predictor", "measure_quality", "quality_of", "window_of"]

WINDOW = 256
"""Tokens that the models see at once, as in ``fxprune eval``."""

WINDOWS = 12
"""Windows of a text: three thousand tokens tell a good result from a bad one, and take seconds."""

ANSWER = 24
"""Tokens of the greedy answer."""

BUILT_IN = "docstrings of Python"
"""Name of the text that is measured on if there is no other."""

_POSITIONS = "max_position_embeddings"
"""Name that configs of transformers give the longest sequence."""

_FEWEST = 4
"""Windows of a text that its errors can be estimated from."""


def graph_predictor(graph_module: fx.GraphModule, *, shared: bool = False) -> Callable[..., Tensor]:
    """A function from token ids ``(batch, tokens)`` to logits that runs a graph and writes to none of its tensors.

    Args:
        graph_module: the graph.
        shared: whether the graph is that of the dense model of a sweep, which predicts the same text again.
    """

    def predict(input_ids: Tensor) -> Tensor:
        if not shared:
            return run(input_ids)
        return shared_tensor((id(graph_module), tuple(input_ids.flatten().tolist())), lambda: run(input_ids))

    def run(input_ids: Tensor) -> Tensor:
        inputs = batched(read_calibration(input_ids, graph_module), graph_module)
        return run_logits(UntouchedRun(graph_module), inputs).to(input_ids.device)

    return predict


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
    windows: int = WINDOWS,
    track: Track = no_progress,
) -> Quality:
    """Measure a slim model beside the dense one: predictions on a text, and the greedy answer to a question.

    Args:
        dense: a Hugging Face model, or any callable that takes ``input_ids=`` and returns logits.
        slim: the same.
        tokenizer: of both, or of the slim model.
        text: a file of text, or the name of a data set; None for docstrings of Python's library, which also take the
            place of a text that has too few windows left.
        dense_tokenizer: of the dense model, if it has other tokens.
        speakers: the dense and the slim model to generate the answer; None for no answer.
        pruned: the slim graph, whose facts tell which samples the prune used: windows with a part of one are left out.
        window: tokens that the models see at once.
        windows: most windows, from all over the text.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        FxpruneError: a model cannot be run on the text, or all of the text was used.
    """
    seen = () if pruned is None else _samples_used(pruned)
    options: dict[str, Any] = {"window": window, "limit": windows, "seen": seen, "track": track, "batch": 1}
    options["reference_tokenizer"] = dense_tokenizer
    name = BUILT_IN if text is None else text_source(text)
    found: tuple[Perplexity, Perplexity] | None = None
    with preserve_rng():
        if text is not None:
            with suppress(EvaluationError):  # it is too short, or all of it was used
                content = calibration_text(text, tokenizer)
                found = paired_perplexities(slim, dense, tokenizer, content, **options)
        if found is None or found[0].windows < _FEWEST:
            name = BUILT_IN
            found = paired_perplexities(slim, dense, tokenizer, offline_docstrings(), **options)
        answers = (
            () if speakers is None else _answers(*zip(speakers, (dense_tokenizer or tokenizer, tokenizer), strict=True))
        )
    return Quality((_text_quality(name, *found),), answers)


def _samples_used(graph_module: fx.GraphModule) -> list[Tensor]:
    """Token ids of the samples that a prune calibrated on, or stopped by."""
    facts, name = facts_of(graph_module), token_input(graph_module)
    known = [fact for fact in (facts.get(Calibration), facts.get(HeldOut)) if fact is not None]
    return [sample.inputs[name] for fact in known for sample in fact.samples] if name else []


def window_of(model: Any) -> int:
    """Tokens of a window: :data:`WINDOW`, or as many as a model takes."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    most = getattr(text, _POSITIONS, None)
    return min(WINDOW, most) if isinstance(most, int) else WINDOW


def quality_of(dense: Evaluation, slim: Evaluation) -> Quality:
    """The quality in evaluations of both models on the same texts, the dense one as reference; of answers the first."""
    texts = tuple(
        _text_quality(name, dense.perplexities[name], value)
        for name, value in slim.perplexities.items()
        if value.divergence is not None
    )
    if dense.answers is None or slim.answers is None:
        return Quality(texts, ())
    return Quality(texts, _first_answer(dense.answers, slim.answers))


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
    """The answers of both models, each with its tokenizer, to a question; none if one generates no text.

    Copies run, in case they write.
    """
    if not (can_generate(dense[0]) and can_generate(slim[0])):
        return ()
    found = []
    for model, tokenizer in (dense, slim):
        written = written_parameters(model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
        twin: Any = alias_twin(model, written)
        found.append(answer_questions(twin, tokenizer, plain_questions()[:1], tokens=ANSWER))
    return _first_answer(*found)


def _first_answer(dense: Answers, slim: Answers) -> tuple[GreedyAnswer, ...]:
    return (GreedyAnswer(dense.questions[0], dense.texts[0], slim.texts[0]),)
