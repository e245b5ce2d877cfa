"""Numbers of units that remove a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .base import Choice, Selection
from .ranking import count_below, normalised
from .slots import units_left

__all__ = ["CLOSE", "Solver"]

CLOSE = 0.005
"""Half a percentage point: how near the achieved ratio has to be where the units are small enough."""

_HALVINGS = 40
"""2 ** -40 of a unit is nothing: more halvings change no rounded number."""


class Solver:
    """Finds numbers of units that remove a number of parameters, or of whatever the budget counts.

    Args:
        selection: what to choose from.
        target: how much has to go.
        shares: how many times as large a fraction goes from each slot as from one with 1; none of one with 0. None for
            1 everywhere.
    """

    def __init__(self, selection: Selection, target: float, shares: Sequence[float] | None = None) -> None:
        self.slots = selection.slots
        self.budget = selection.budget
        self.target = target
        self.shares = [1.0] * len(self.slots) if shares is None else shares

    def removed(self, choices: Sequence[tuple[int, float]]) -> float:
        """Parameters removed by choices for all slots, fractional ones too."""
        blocks: dict[str, float] = {}
        for slot, (_, count) in zip(self.slots, choices, strict=True):
            for i, group in enumerate(slot.layers):
                # while solving, the removed fraction is spread over all layers
                share = count / len(slot.layers) if count != int(count) else float(i < count)
                if group.block is not None and share:
                    blocks[group.block] = share
        return self.budget.removed(units_left(self.slots, dict(enumerate(choices))), blocks)

    def most(self) -> list[Choice]:
        """As many units as may go, in the option that removes most."""
        best = []
        for number, slot in enumerate(self.slots):
            picks = [(i, option.most) for i, option in enumerate(slot.options)]
            best.append(max(picks, key=lambda pick: self._alone(number, pick)))
        return best

    def local(self) -> list[Choice]:
        """The same fraction everywhere, times the share, kinds with the largest units rounded first."""
        fixed: dict[int, Choice] = {}
        for kind in self._kinds_by_unit():
            fraction = self.fraction(fixed)
            for number, slot in enumerate(self.slots):
                if slot.kind == kind:
                    fixed[number] = slot.choose(min(fraction * self.shares[number], 1.0))
        return [fixed[number] for number in range(len(self.slots))]

    def globally(self) -> list[Choice]:
        """The lowest normalised scores, up to the threshold that comes nearest to the target."""
        values = normalised(self.slots)
        thresholds = np.unique(np.concatenate(values)) if values else np.zeros(0)
        rows = list(zip(self.slots, values, strict=True))

        def pick(threshold: float) -> list[Choice]:
            return [(0, count_below(slot, row, threshold)) for slot, row in rows]

        low, high = 0, len(thresholds)
        while low < high:
            middle = (low + high) // 2
            if self.removed(pick(float(thresholds[middle]))) < self.target:
                low = middle + 1
            else:
                high = middle
        ends = [pick(float(thresholds[i])) for i in (low - 1, low) if 0 <= i < len(thresholds)]
        ends.append(pick(float("inf")))
        return min(ends, key=lambda choices: abs(self.removed(choices) - self.target))

    def repair(self, choices: list[Choice]) -> list[Choice]:
        """Move single units, cheapest first, as long as each brings the number nearer to the target.

        Slots with the smallest units are tried first; larger ones only while that leaves more than half a percent.
        """
        for kind in reversed(self._kinds_by_unit()):
            choices = self._repair_kind(choices, kind)
            if abs(self.removed(choices) - self.target) <= CLOSE * self.budget.total:
                break
        return choices

    def _repair_kind(self, choices: list[Choice], kind: str) -> list[Choice]:
        error = self.target - self.removed(choices)
        queue = self._moves(choices, kind, up=error > 0)
        while queue:
            number, pick = queue.pop(0)
            trial = [*choices[:number], pick, *choices[number + 1 :]]
            left = self.target - self.removed(trial)
            if abs(left) >= abs(error):
                continue
            choices, passed, error = trial, (left > 0) != (error > 0), left
            if passed:
                break
            queue = queue or self._moves(choices, kind, up=error > 0)
        return choices

    def _moves(self, choices: list[Choice], kind: str, *, up: bool) -> list[tuple[int, Choice]]:
        """One step more (or less) in each slot of ``kind``, lowest score first to remove, highest to give back."""
        found: list[tuple[float, int, Choice]] = []
        for number, (slot, (i, removed)) in enumerate(zip(self.slots, choices, strict=True)):
            if slot.kind != kind or not self.shares[number]:
                continue
            if removed == 0 and up:
                i = next((j for j, option in enumerate(slot.options) if option.most), i)
            option = slot.options[i]
            new = option.more(removed) if up else option.less(removed)
            if new is None or new == removed:
                continue
            cost = float(option.scores[min(new, removed) : max(new, removed)].mean())
            found.append((cost if up else -cost, number, (i, new)))
        return [(number, pick) for _, number, pick in sorted(found)]

    def fraction(self, fixed: Mapping[int, Choice]) -> float:
        """The fraction of units of the slots not ``fixed`` that removes what is left to remove."""

        def choices(fraction: float) -> list[tuple[int, float]]:
            firsts = [(slot.options[0], share) for slot, share in zip(self.slots, self.shares, strict=True)]
            free = [(0, min(fraction * share * option.size, option.most)) for option, share in firsts]
            return [fixed.get(number, pick) for number, pick in enumerate(free)]

        largest = 1 / min((share for share in self.shares if share), default=1.0)
        return _bisect(lambda fraction: self.removed(choices(fraction)), self.target, max(largest, 1.0))

    def _kinds_by_unit(self) -> list[str]:
        """The kinds present, largest unit first."""
        cost: dict[str, float] = {}
        for number, slot in enumerate(self.slots):
            cost[slot.kind] = max(cost.get(slot.kind, 0.0), self._alone(number, (0, slot.options[0].more(0) or 0)))
        return sorted(cost, key=lambda kind: -cost[kind])

    def _alone(self, number: int, pick: Choice) -> float:
        """Parameters removed by one slot's choice alone."""
        return self.removed([pick if i == number else (0, 0) for i in range(len(self.slots))])


def _bisect(function: Callable[[float], float], target: float, high: float) -> float:
    """Where a growing function on [0, high] takes the value ``target``; an end where it never does."""
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2
