"""A text in the tokens of two tokenizers: the places where both end a token, and the tokens that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxprune.data.text import opening_tokens
from fxprune.errors import EvaluationError

Offsets: TypeAlias = tuple[int, int]
"""The first character of a token in a text, and the one after its last."""


@dataclass(frozen=True)
class Alignment:
    """The places of a text where both of two tokenizers end a token, and its start.

    Args:
        ours: tokens of the one before each place ``(places,)``, in order.
        theirs: tokens of the other.
    """

    ours: Tensor
    theirs: Tensor


def align(ours: Sequence[Offsets], theirs: Sequence[Offsets]) -> Alignment:
    """Align two tokenizations of a text by the places of their tokens in it."""
    one, other = map(_ends, (ours, theirs))
    places = sorted(one.keys() & other.keys())
    return Alignment(*(torch.tensor([each[place] for place in places]) for each in (one, other)))


def _ends(offsets: Sequence[Offsets]) -> dict[int, int]:
    """The number of tokens before each place that a token ends at and no other one spans.

    A token that is a part of a character is at the place of the whole character.
    """
    starts = [start for start, _ in offsets[1:]]
    spanned = ((end, number) for number, (_, end) in enumerate(offsets, 1) if starts[number - 1 : number] >= [end])
    last = {offsets[-1][1]: len(offsets)} if offsets else {}
    return {0: 0} | dict(spanned) | last


def retokenised(ids: Sequence[int], ours: Any, theirs: Any) -> tuple[Tensor, Alignment] | None:
    """Token ids of the same text for another tokenizer ``(tokens,)``, and the places where both end a token.

    Ids that begin as the one tokenizer begins a text begin as the other one does. None if the text is not written by
    the same ids again, as one that was cut within a word.
    """
    start, begin = (opening_tokens(tokenizer) for tokenizer in (ours, theirs))
    if list(ids[: len(start)]) != start:
        start = begin = []
    ids = ids[len(start) :]
    text = ours.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": True}
    own, other = ours(text, **options), theirs(text, **options)
    if list(own["input_ids"]) != list(ids):
        return None
    found = align(own["offset_mapping"], other["offset_mapping"])
    moved = Alignment(found.ours + len(start), found.theirs + len(begin))
    return torch.tensor([*begin, *other["input_ids"]]), moved


def has_other_tokens(ours: Any, theirs: Any) -> bool:
    """Whether two tokenizers have different tokens, or number them differently."""
    return ours is not theirs and bool(ours.get_vocab() != theirs.get_vocab())


def common_ids(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that both tokenizers have, in one and in the other, ``(tokens,)`` each.

    Raises:
        EvaluationError: there are none.
    """
    one, other = ours.get_vocab(), theirs.get_vocab()
    texts = sorted(one.keys() & other.keys(), key=one.__getitem__)
    if not texts:
        what = "the tokenizers of both models have no token in common"
        raise EvaluationError(what, where="reference", remedy="Compare models by their bits per byte, one by one")
    return torch.tensor([one[text] for text in texts]), torch.tensor([other[text] for text in texts])
