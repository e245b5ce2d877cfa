"""Pruning of a vocabulary: the tokens that stay, the tokenizer and the model, and the dense model as teacher of it."""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.data.calibration import spread
from fxprune.data.text import calibration_text, check_tokenizer, opening_tokens
from fxprune.errors import ArgumentError, CalibrationError, PlanError, RatioError
from fxprune.pipeline.arguments import number, refuse, whole_number
from fxprune.trace.inputs import is_hugging_face, without_cache
from fxprune.vocabulary.alignment import retokenised
from fxprune.vocabulary.model import expected_use, find_rows, ids_in_settings, trimmed_model
from fxprune.vocabulary.tokenizer import Tokens, check_kind, read_tokens, specification, trimmed_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Use:
    """How often tokens are used.

    Args:
        counts: in a corpus.
        expected: the sum of the probabilities that the model gives each token, at positions of the corpus; empty if
            they are not known. It tells tokens that the corpus might have used from those of other languages.
        heldout: the part of the counts that :func:`best_order` compares by, from each of some parts of the corpus.
    """

    counts: Mapping[int, int]
    expected: Mapping[int, float] = field(default_factory=dict)
    heldout: tuple[Mapping[int, int], ...] = ()


def choose_tokens(
    tokens: Tokens, use: Use, size: int, needed: Collection[int], *, free: bool = False, round_to: int = 1
) -> tuple[int, ...]:
    """Ids of the tokens that stay, in order.

    The token whose removal makes the corpus longest by the least goes first: its count times the pieces that write its
    text without it, less one, and at least one. Its pieces are then used as often as it was. Of tokens with equal costs
    the one goes first that costs less by what the model expects, then the one with the highest id, since ids follow the
    frequency in the text that a tokenizer was trained on. A token that others are merged from goes after them.

    Args:
        size: tokens that stay.
        needed: ids that must stay.
        free: whether only tokens go that the corpus does not use.
        round_to: more tokens stay if fewer would not be a multiple of this.

    Complexity: ``n log n`` for ``n`` tokens.
    """
    counts, expected, gone = Counter(use.counts), defaultdict(float, use.expected), dict[int, None]()
    parents = Counter(part for number in tokens.texts for part in tokens.parts(number))
    surplus = len(tokens.every) - size

    def entry(number: int) -> tuple[int, float, int]:
        is_used = counts[number] or expected[number]
        # a byte in place of a character makes no text longer, but is one that the model has hardly seen
        more = max(len(tokens.pieces(number, gone)) - 1, 1) if is_used else 0
        return counts[number] * more, expected[number] * more, -number

    heap = [entry(number) for number in tokens.texts if not parents[number] and number not in needed]
    heapq.heapify(heap)
    while len(gone) < surplus and heap:
        known = heapq.heappop(heap)
        number = -known[-1]
        now = entry(number)
        if now > known:  # its pieces became more, or it is a piece of another one that went
            heapq.heappush(heap, now)
            continue
        if free and now[0]:
            break
        gone[number] = None
        for piece in tokens.written(number, gone) if now[:2] != (0, 0) else ():
            counts[piece] += counts[number]
            expected[piece] += expected[number]
        for part in tokens.parts(number):
            parents[part] -= 1
            if not parents[part] and part not in needed:
                heapq.heappush(heap, entry(part))
    while gone and (len(tokens.every) - len(gone)) % round_to:
        gone.popitem()
    return tuple(sorted(tokens.every - gone.keys()))


def best_order(tokens: Tokens, use: Use, size: int, needed: Collection[int], *, free: bool = False) -> Use:
    """The best of several readings of a use, by held-out text.

    It may be all of it; the counts alone, so that of unused tokens those with the highest ids go; or none of it, so
    that these go whatever the corpus uses. Of a small corpus, counts say little about rare tokens, and where all tokens
    are of its language, the text that a tokenizer was trained on says more about other texts. So the one that reads
    least is taken of those that cost held-out text no more than the best does, to within a standard error of the
    difference over its parts. Tokens cost as in :func:`choose_tokens`, whose arguments these are.

    Source: the rule of one standard error of Breiman et al., Classification and Regression Trees (1984), section 3.4.
    """
    if len(use.heldout) < 2:
        return use
    seen = Counter(use.counts)
    for part in use.heldout:
        seen.subtract(part)

    def costs(reading: Use) -> list[int]:
        counts = seen if reading.counts else {}
        gone = tokens.every - set(choose_tokens(tokens, replace(reading, counts=counts), size, needed, free=free))
        more = {one: max(len(tokens.written(one, gone)) - 1, 1) for one in gone if use.counts.get(one)}
        return [sum(part[one] * each for one, each in more.items() if one in part) for part in use.heldout]

    readings = [*([] if free else [Use({})]), Use(use.counts), use]
    found = [costs(reading) for reading in readings]
    best = min(found, key=sum)
    for reading, own in zip(readings, found, strict=True):
        apart = [a - b for a, b in zip(own, best, strict=True)]
        if fmean(apart) <= stdev(apart) / math.sqrt(len(apart)):
            return reading
    return use


@dataclass(frozen=True)
class VocabularyReport:
    """A prune of a vocabulary in numbers, before and after.

    Args:
        kept: the id that each token had, in the order of the new ids.
        rows: of the embedding.
        parameters: of the model.
        tokens: that the corpus takes.
    """

    kept: tuple[int, ...] = field(repr=False)
    rows: tuple[int, int]
    parameters: tuple[int, int]
    tokens: tuple[int, int]

    def __str__(self) -> str:
        (rows, fewer), (parameters, left), (tokens, more) = self.rows, self.parameters, self.tokens
        longer = f"; the corpus takes {more / tokens - 1:.2%} more tokens" if tokens else ""
        return f"{rows:,} to {fewer:,} tokens, {parameters:,} to {left:,} parameters{longer}"


@dataclass(frozen=True)
class PrunedVocabulary:
    """A model and a tokenizer with fewer tokens, and the tokens of the whole tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    report: VocabularyReport
    tokens: Tokens

    def rewritten(self, rows: Iterable[Iterable[int]]) -> list[list[int]]:
        """Rows of token ids of the whole tokenizer with new ids; a token that went is written by its pieces."""
        new = {old: place for place, old in enumerate(self.report.kept)}
        gone = self.tokens.every - new.keys()
        return [[new[kept] for number in row for kept in self.tokens.written(number, gone)] for row in rows]


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: str | os.PathLike[str] | Iterable[str],
    *,
    ratio: float | None = None,
    size: int | None = None,
    round_to: int = 1,
) -> tuple[PreTrainedModel, Any, VocabularyReport]:
    """Remove from a model and its tokenizer the tokens that a corpus needs least.

    Every text can still be written, and a text that is written with kept tokens alone gives the same logits for them.

    Args:
        model: a Hugging Face model of token ids, which stays as it is.
        tokenizer: its fast tokenizer, of the kind BPE, Unigram or WordPiece; it stays as it is.
        corpus: text of the kind that the model will be used on: a file as for the calibration of a prune, or texts.
        ratio: fraction of the parameters of the model to remove.
        size: number of tokens to keep; with neither, those stay that the corpus uses or that must.
        round_to: the number of tokens is a multiple of this, where there are as many.

    Returns:
        A model of the same class, a tokenizer of the same class, and the report.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range.
        RatioError: more tokens must stay.
        UnsupportedModelError: the tokenizer is of another kind, or the model has no embedding of tokens.
        VerificationError: the logits of kept tokens are not those of the model.
    """
    if not is_hugging_face(model):
        raise refuse("model", model, "a Hugging Face model")
    if tokenizer is None:
        raise refuse("tokenizer", tokenizer, "the tokenizer of the model")
    check_tokenizer("tokenizer", tokenizer)
    check_kind(tokenizer)
    if ratio is not None and size is not None:
        raise ArgumentError("$ratio beside $size: both say how many stay", where="size", remedy="Leave one of them out")
    if ratio is not None:
        size = size_after(model, number("ratio", ratio, least=0, below=1))
    elif size is not None:
        size = whole_number("size", size, least=1)
    round_to = whole_number("round_to", round_to, least=1)
    use = measure_use(model, text_ids(tokenizer, _texts(corpus)), opening_tokens(tokenizer))
    found = trim(model, tokenizer, use, 0 if size is None else size, free=size is None, round_to=round_to)
    return found.model, found.tokenizer, found.report


def size_after(model: PreTrainedModel, ratio: float) -> int:
    """The number of tokens left after removing a fraction of the parameters as rows; may be negative."""
    rows = find_rows(model)
    return rows.size - math.ceil(ratio * sum(parameter.numel() for parameter in model.parameters()) / rows.each)


def trim(
    model: PreTrainedModel,
    tokenizer: Any,
    use: Use,
    size: int,
    *,
    round_to: int = 1,
    free: bool = False,
    share: bool = False,
) -> PrunedVocabulary:
    """A model and its tokenizer with ``size`` tokens, those used most, and those that must stay.

    Args:
        free: remove no token that is used, even if more than ``size`` stay.
        share: whether all tensors without tokens are those of the model.
    """
    tokens, rows = read_tokens(specification(tokenizer)), find_rows(model)
    if unknown := use.counts.keys() - tokens.every:
        what = f"it has the id {min(unknown)}, for which the tokenizer has no token"
        raise CalibrationError(what, where="calibration", remedy="Tokenise with the tokenizer of this model")
    needed = _needed(model, tokens)
    if size < len(needed) and not free:
        total = sum(parameter.numel() for parameter in model.parameters())
        most = (rows.size - len(needed)) * rows.each / total
        what = f"{max(size, 0):,} of {rows.size:,} tokens would stay, and {len(needed):,} must, to write every text"
        remedy = f"Ask for at most {math.floor(most * 1000) / 1000:.3f} of the parameters"
        error = RatioError(what, where="vocabulary", remedy=remedy)
        error.reachable = most
        raise error
    size = -(-max(size, len(needed)) // round_to) * round_to
    order = best_order(tokens, use, size, needed, free=free)
    kept = choose_tokens(tokens, order, size, needed, free=free, round_to=round_to)
    return carry_out(model, tokenizer, kept, tokens, use, share=share)


def _needed(model: PreTrainedModel, tokens: Tokens) -> frozenset[int]:
    """Ids of the tokens that must stay: to write every text, and because settings name them."""
    return (tokens.needed | ids_in_settings(model)) & tokens.every


def carry_out(
    model: PreTrainedModel, tokenizer: Any, kept: Sequence[int], tokens: Tokens, use: Use, *, share: bool
) -> PrunedVocabulary:
    """A model and its tokenizer with the tokens ``kept``, among which must be all that have to stay."""
    if lacking := _needed(model, tokens).difference(kept):
        what = f"it leaves out {tokenizer.convert_ids_to_tokens(min(lacking))!r}, a token of this model that must stay"
        raise PlanError(what, where="vocabulary", remedy="Use the plan's own model, or make the plan again")
    slim = trimmed_model(model, kept, share=share)
    whole, left = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, slim))
    gone = tokens.every - set(kept)
    more = sum(count * len(tokens.written(token, gone)) for token, count in use.counts.items())
    sizes = (find_rows(model).size, len(kept)), (whole, left), (sum(use.counts.values()), more)
    report = VocabularyReport(tuple(kept), *sizes)
    return PrunedVocabulary(slim, trimmed_tokenizer(tokenizer, kept), report, tokens)


def text_ids(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of texts, without those that a tokenizer puts around them."""
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def measure_use(model: PreTrainedModel, rows: Iterable[Sequence[int]], opening: Sequence[int] = ()) -> Use:
    """How often rows of token ids use each token, and how often the model expects it on some windows of them.

    Each window begins with the ids ``opening``, which are not counted.
    """
    found = [list(row) for row in rows]
    counts = Counter(number for row in found for number in row)
    if not counts:
        remedy = "Give text of the kind that the model will be used on"
        raise CalibrationError("it has no text", where="corpus", remedy=remedy)
    total, done = counts.total(), 0
    windows, parts = [], defaultdict[int, Counter[int]](Counter)
    for window in (row[start : start + _TOKENS] for row in found for start in range(0, len(row), _TOKENS)):
        if (part := _PARTS * done // total) % _EVERY == _EVERY // 2:
            parts[part].update(window)
        elif len(window) + len(opening) > 1:
            windows.append([*opening, *window])
        done += len(window)
    return Use(counts, expected_use(model, map(torch.tensor, spread(windows, _WINDOWS))), tuple(parts.values()))


_WINDOWS, _TOKENS = 16, 128
"""Windows of the corpus that the model reads, and tokens of each."""

_PARTS, _EVERY = 50, 5
"""Parts of the corpus, of which one in so many is held out: long ones, since windows beside each other share words."""


def _texts(corpus: Any) -> list[str]:
    wanted = "the path of a file of text, or texts"
    if isinstance(corpus, str | os.PathLike):
        if isinstance(corpus, str) and not os.path.isfile(corpus):
            raise refuse("corpus", corpus, f"{wanted} in a list; there is no such file")
        return [calibration_text(Path(corpus))]
    if isinstance(corpus, bytes | Mapping) or not isinstance(corpus, Iterable):
        raise refuse("corpus", corpus, wanted)
    texts = list(corpus)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise refuse("corpus", wrong[0], wanted)
    return texts


@dataclass(frozen=True, eq=False)
class DenseTeacher:
    """The dense model, in the tokens that stay.

    It reads a text in its own tokens. Where both tokenizers end one, its probability of a token that went is that of
    the first token which now writes it. Within such a token, the tokens that write it are known.

    Args:
        model: runs on token ids of the dense model.
        tokenizer: its tokenizer.
        words: the tokenizer of the tokens that stay.
        first: the new id of the first token that writes each token; for ids of none the number of those that stay.
        stay: this number.
    """

    model: Callable[..., Any]
    tokenizer: Any
    words: Any
    first: Tensor
    stay: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, found: PrunedVocabulary) -> DenseTeacher:
        rows, stay = found.report.rows
        first = torch.full((rows,), stay)
        every = sorted(found.tokens.every)
        first[torch.tensor(every)] = torch.tensor([row[0] for row in found.rewritten([number] for number in every)])
        return cls(model, tokenizer, found.tokenizer, first, stay)

    def log_probabilities(self, ids: Tensor) -> Tensor | None:
        """Log-probabilities of next tokens ``(tokens, tokens that stay)`` in a text ``(tokens,)``.

        None if the text is not written by the same ids again.
        """
        found = retokenised(ids.tolist(), self.words, self.tokenizer)
        if found is None:
            return None
        theirs, places = found
        used = (places.ours > 0) & (places.theirs > 0)
        with torch.no_grad():
            logits = self.model(input_ids=theirs[None], **without_cache(self.model)).logits[0]
        result = torch.zeros(len(ids), self.stay + 1)
        result[torch.arange(len(ids) - 1), ids[1:]] = 1.0
        likely = logits[places.theirs[used] - 1].float().softmax(-1)
        result[places.ours[used] - 1] = torch.zeros(len(likely), self.stay + 1).index_add_(1, self.first, likely)
        return result[:, :-1].clamp_min(torch.finfo(torch.float32).tiny).log()
