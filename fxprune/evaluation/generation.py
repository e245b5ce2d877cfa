"""Greedy answers to plain questions, compared with those of a reference model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from statistics import stdev
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fxprune.data.text import common_prefix
from fxprune.errors import EvaluationError, PositionsError
from fxprune.evaluation.perplexity import positions_named
from fxprune.graph.context import eval_mode, quiet, replaced, wrap_errors
from fxprune.pipeline.arguments import refuse, whole_number
from fxprune.pipeline.contract import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_questions() -> list[str]:
    """Sixty plain questions that a small chat model can answer in a sentence."""
    return files("fxprune.evaluation").joinpath("questions.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Answers:
    """Greedy answers to questions: as text, and as the token ids that were generated.

    ``too_long`` are the questions that were not answered, since the model has too few positions for their answers.
    """

    questions: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    too_long: tuple[str, ...] = ()

    def without(self, questions: Collection[str]) -> Answers:
        """The answers to other questions than these."""
        kept = [i for i, question in enumerate(self.questions) if question not in questions]
        texts, ids = (tuple(row[i] for i in kept) for row in (self.texts, self.ids))
        return Answers(tuple(self.questions[i] for i in kept), texts, ids, self.too_long)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Generation:
    """Quality of greedy answers, the mean over questions; ``_error`` is its standard error.

    Args:
        questions: number of questions.
        repetition: fraction of the 4-grams of an answer that occurred in it before (seq-rep-4 of Welleck et al.,
            "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319).
        distinct_1: different tokens over tokens, of all answers together (Li et al., arXiv 1510.03055).
        distinct_2: the same of pairs of tokens.
        overlap: F1 of the words of an answer and of the reference's (Rajpurkar et al., arXiv 1606.05250); None without
            a reference, as is all that follows.
        same_start: fraction of the reference's tokens up to the first that differs.
        same: fraction of the answers that are the reference's to the last token.
    """

    questions: int
    repetition: float
    repetition_error: float
    distinct_1: float
    distinct_2: float
    overlap: float | None = None
    overlap_error: float | None = None
    same_start: float | None = None
    same_start_error: float | None = None
    same: float | None = None
    same_error: float | None = None


@wrap_errors("answers", "Pass a decoder of transformers and its own tokenizer", EvaluationError)
def answer_questions(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[str] | None = None,
    *,
    tokens: int = 48,
    batch: int = 10,
    track: Track = no_progress,
) -> Answers:
    """Greedy answers of a model; in its chat template, if the tokenizer has one.

    Args:
        questions: None for :func:`plain_questions`.
        tokens: most tokens of an answer.
        batch: questions per call, padded on the left.

    Raises:
        EvaluationError: the model generates no text; a PositionsError if it has too few positions for any answer.
    """
    asked = tuple(plain_questions() if questions is None else questions)
    if not asked or not all(isinstance(question, str) for question in asked):
        raise refuse("questions", questions, "a list of texts", EvaluationError)
    tokens = whole_number("tokens", tokens, least=1, error=EvaluationError)
    batch = whole_number("batch", batch, least=1, error=EvaluationError)
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        remedy = "Pass a decoder of transformers, or leave the answers out"
        raise EvaluationError(f"a {type(model).__name__} generates no text", where="answers", remedy=remedy)
    prompts = [_prompt(tokenizer, question) for question in asked]
    own_ends: Any = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own_ends if isinstance(own_ends, list | tuple) else [own_ends])} - {None}
    fill = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    greedy = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=tokens, use_cache=True, pad_token_id=fill, eos_token_id=sorted(ends) or None
    )
    plain = transformers.GenerationConfig()
    found: dict[int, tuple[int, ...]] = {}
    too_long: dict[int, PositionsError] = {}
    generate: Any = model.generate

    def answer(numbers: Sequence[int]) -> None:
        rows = [prompts[number] for number in numbers]
        width = max(map(len, rows))
        ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        try:
            remedy, largest = "Ask for fewer tokens, or for no answers", [int(ids.max())]
            with positions_named((model,), width + tokens, "answers", remedy, largest):
                out = generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        except PositionsError as error:
            if len(numbers) == 1:
                too_long[numbers[0]] = error
                return
            for number in numbers:  # shorter ones may fit
                answer([number])
            return
        for number, row in zip(numbers, out, strict=True):
            found[number] = tuple(takewhile(lambda token: token not in ends, row[width:].tolist()))

    with replaced(model, generation_config=plain), eval_mode(model), torch.no_grad(), quiet(logging.WARNING):
        starts = range(0, len(prompts), batch)
        for start in track(starts, "answers", len(starts)):
            answer(range(len(prompts))[start : start + batch])
    if not found:
        raise next(iter(too_long.values()))
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True).strip() for row in found.values())
    answered = tuple(asked[number] for number in found)
    return Answers(answered, texts, tuple(found.values()), tuple(asked[number] for number in too_long))


def _prompt(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question, in the chat template of a tokenizer that has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": question}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer(f"Question: {question}\nAnswer:", verbose=False)
    return list(encoded["input_ids"])


def compare_answers(answers: Answers, reference: Answers | None = None) -> Generation:
    """Measure answers, and compare them with those of a reference model to the same questions.

    Raises:
        EvaluationError: the reference answers other questions.
    """
    measured = {"repetition": [1 - _distinct([row], 4, none=1.0) for row in answers.ids]}
    if reference is not None:
        if reference.questions != answers.questions:
            what, remedy = "its answers are to other questions", "Ask both models the same questions"
            raise EvaluationError(what, where="reference", remedy=remedy)
        pairs = list(zip(answers.ids, reference.ids, strict=True))
        texts = zip(answers.texts, reference.texts, strict=True)
        measured["overlap"] = [word_overlap(a, b) for a, b in texts]
        # an end counts as a token
        measured["same_start"] = [common_prefix([*a, -1], [*b, -1]) / (len(b) + 1) for a, b in pairs]
        measured["same"] = [float(a == b) for a, b in pairs]
    found: dict[str, Any] = {f"distinct_{size}": _distinct(answers.ids, size) for size in (1, 2)}
    for name, values in measured.items():
        found[name], found[f"{name}_error"] = mean_and_error(values)
    return Generation(len(answers.ids), **found)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; both 0 without values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return sum(values) / max(len(values), 1), error


def _distinct(rows: Sequence[Sequence[int]], size: int, none: float = 0.0) -> float:
    """Different runs of ``size`` tokens over all of them; ``none`` if the rows are shorter."""
    grams = [tuple(row[i : i + size]) for row in rows for i in range(len(row) - size + 1)]
    return len(set(grams)) / len(grams) if grams else none


def word_overlap(text: str, reference: str) -> float:
    """F1 of the words of two texts, each word as often as it occurs; 1 if both have none."""
    ours, theirs = Counter(text.lower().split()), Counter(reference.lower().split())
    common = (ours & theirs).total()
    if not ours and not theirs:
        return 1.0
    return 2 * common / (ours.total() + theirs.total())
