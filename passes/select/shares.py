"""Allocations of a budget as shares: how many times as large a fraction goes from one slot as from another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .base import Choice, Selection
from .slots import Slot
from .solver import Solver

__all__ = ["Allocations", "Shares", "allocations", "move", "picture", "shares_of"]

Shares = tuple[float, ...]

_EVEN = 0.002
"""Allocations that remove so much of the whole more or less count as equal: less than a measurement can tell."""

_NEW = 0.25
"""What a slot that loses nothing gets to begin with, of the mean share of those that lose."""

_BARS = "▁▂▃▄▅▆▇█"


class Allocations:
    """Allocations that remove as much as a given one.

    Args:
        selection: what to choose from.
        target: how much goes.
    """

    def __init__(self, selection: Selection, target: float) -> None:
        self.selection, self.target = selection, target

    def choices(self, shares: Shares) -> list[Choice] | None:
        """Return choices by which each slot loses its share; None where that does not remove as much."""
        if not any(shares):
            return None
        solver = Solver(self.selection, self.target, shares)
        found = solver.repair(solver.local())
        even = abs(solver.removed(found) - self.target) <= _EVEN * self.selection.budget.total
        return found if even else None

    def splits(self) -> Iterator[tuple[str, Shares]]:
        """Yield splits between kinds to begin with: each kind alone, and the smaller ones at half their share."""
        slots = self.selection.slots
        kinds = sorted({slot.kind for slot in slots}, key=lambda kind: -self.selection.sizes.get(kind, 0.0))
        yield "the same share everywhere", (1.0,) * len(slots)
        for kind in kinds if len(kinds) > 1 else ():
            yield f"{kind} alone", tuple(float(slot.kind == kind) for slot in slots)
        if len(kinds) > 1:
            yield f"more from {kinds[0]}", tuple(1.0 if slot.kind == kinds[0] else 0.5 for slot in slots)

    def parts(self, bins: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the numbers of the slots of each kind in each part of the depth."""
        for kind in dict.fromkeys(slot.kind for slot in self.selection.slots):
            places = [place for place, slot in enumerate(self.selection.slots) if slot.kind == kind]
            count = min(bins, len(places))
            for i in range(count):
                part = tuple(places[i * len(places) // count : (i + 1) * len(places) // count])
                yield f"{kind} in part {i + 1} of {count}", part


def allocations(selection: Selection, begun: Sequence[Choice]) -> Allocations:
    """Return allocations that remove as much as ``begun``."""
    return Allocations(selection, Solver(selection, 0.0).removed(begun))


def shares_of(slots: Sequence[Slot], choices: Sequence[Choice]) -> Shares:
    """Return the shares that choices amount to: the fraction that goes from each slot."""
    return tuple(count / slot.options[i].size for slot, (i, count) in zip(slots, choices, strict=True))


def move(shares: Shares, part: Sequence[int], factor: float) -> Shares:
    """Return shares of which those in ``part`` are multiplied; one of 0 that is to grow gets a small one."""
    losing = [share for share in shares if share]
    new = _NEW * sum(losing) / max(len(losing), 1)
    moved = set(part)
    return tuple(
        share if place not in moved else (share * factor if share or factor < 1 else new)
        for place, share in enumerate(shares)
    )


def picture(slots: Sequence[Slot], choices: Sequence[Choice]) -> Iterator[str]:
    """Yield a line for each kind: what stays of each slot, from front to end, as bars."""
    for kind in dict.fromkeys(slot.kind for slot in slots):
        left = [
            1 - count / slot.options[i].size
            for slot, (i, count) in zip(slots, choices, strict=True)
            if slot.kind == kind
        ]
        bars = "".join(_BARS[min(int(part * len(_BARS)), len(_BARS) - 1)] for part in left)
        yield f"{kind} {bars} {sum(left) / len(left):.0%} left"
