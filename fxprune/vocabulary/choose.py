"""The choice of tokens that stay, by what a corpus uses and what the model expects in it."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fxprune.vocabulary.pieces import Tokens

__all__ = ["Use", "choose_tokens"]


@dataclass(frozen=True)
class Use:
    """How often tokens are used.

    Args:
        counts: in a corpus.
        expected: the sum of the probabilities that the model gives each token, at positions of the corpus; empty if
            they are not known. It tells tokens that the corpus might have used from those of other languages.
    """

    counts: Mapping[int, int]
    expected: Mapping[int, float] = field(default_factory=dict)


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
