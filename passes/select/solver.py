"""Solver for the units that go, by slot, so that a budget is met."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter

import numpy as np

from fxprune.axes import Factor
from fxprune.removal.budget import Budget
from fxprune.removal.removal import Array

from .base import Choice, Selection, Slot, left_by, removed_by

CLOSE = 0.005
"""The achieved ratio is within half a percentage point of the requested one if the units are small enough."""


_ROUNDS = 3
"""Most combinations that are tried: what a slot removes depends a little on the others, and the next corrects that."""

_TRIED = 33
"""Most numbers of units of a slot that combinations are made of, and most combinations that are counted exactly."""

_TIE = 1e-6
"""Weight of scores beside changes of fractions, so small that they decide only between equal ones."""


def _means(slots: Sequence[Slot]) -> dict[str, float]:
    """The mean magnitude of the scores of each kind; 1 if that is 0."""
    by_kind: dict[str, list[Array]] = {}
    for slot in slots:
        by_kind.setdefault(slot.kind, []).append(slot.options[0].scores)
    return {kind: float(np.abs(np.concatenate(found)).mean()) or 1.0 for kind, found in by_kind.items()}


def normalised(slots: Sequence[Slot]) -> list[Array]:
    """The scores of each slot's first option, cheapest first, divided by the mean magnitude of all of its kind."""
    means = _means(slots)
    return [slot.options[0].scores / means[slot.kind] for slot in slots]


def below_threshold(slots: Sequence[Slot], values: Sequence[Array], threshold: Callable[[str], float]) -> list[Choice]:
    """The units of each slot whose values are below the threshold of its kind."""
    pairs = zip(slots, values, strict=True)
    return [(0, slot.options[0].below(int((row < threshold(slot.kind)).sum()))) for slot, row in pairs]


class BudgetSolver:
    """Finds choices that remove the number ``target`` of parameters, or of whatever the budget counts."""

    def __init__(self, selection: Selection, target: float) -> None:
        self.slots = selection.slots
        self.budget = selection.budget
        self.target = target
        self.close = CLOSE * selection.budget.total

    def removed(self, choices: Sequence[tuple[int, float]]) -> float:
        return removed_by(self.budget, self.slots, choices)

    def most(self) -> list[Choice]:
        """As many units as may be removed, in the option that removes most."""
        best = []
        for slot in self.slots:
            picks = [(i, option.most) for i, option in enumerate(slot.options)]
            best.append(max(picks, key=lambda pick: removed_by(self.budget, [slot], [pick])))
        return best

    def local(self) -> list[Choice]:
        """The same fraction everywhere; kinds with the largest units are rounded first."""
        fixed: dict[int, Choice] = {}
        for kind in self._kinds_by_unit():
            fraction = self.fraction(fixed)
            for index, slot in enumerate(self.slots):
                if slot.kind == kind:
                    fixed[index] = slot.choose(min(fraction, 1.0))
        return [fixed[index] for index in range(len(self.slots))]

    def globally(self, *, by_rest: bool = False) -> list[Choice]:
        """The lowest normalised scores, up to the threshold that comes nearest to the target.

        Args:
            by_rest: divide the score of each unit by the fraction of its group that is left when its turn comes.
        """
        values = normalised(self.slots)
        if by_rest:
            values = [row / (1 - np.arange(len(row)) / len(row)) for row in values]
        thresholds: list[float] = np.unique(np.concatenate(values)).tolist() if values else []

        def below(threshold: float) -> list[Choice]:
            return below_threshold(self.slots, values, lambda _: threshold)

        enough = bisect_left(thresholds, self.target, key=lambda threshold: self.removed(below(threshold)))
        ends = [below(threshold) for threshold in thresholds[max(enough - 1, 0) : enough + 1]]
        ends.append(below(float("inf")))
        return min(ends, key=lambda choices: abs(self.removed(choices) - self.target))

    def repair(self, choices: list[Choice]) -> list[Choice]:
        """Move single units, cheapest first, as long as each brings the number nearer to the target.

        Slots with the smallest units are tried first; larger ones only while the error is above half a percent, and
        combinations of all only if it still is then.
        """
        trial = _Trial(self.slots, self.budget, choices)
        for kind in reversed(self._kinds_by_unit()):
            self._repair_kind(trial, kind)
            if abs(trial.removed() - self.target) <= self.close:
                return trial.choices
        for _ in range(_ROUNDS):
            if not self._combine(trial):
                break
        return trial.choices

    def _combine(self, trial: _Trial) -> bool:
        """Take the combination of choices that comes nearest to the target, if that is nearer than the present one.

        Of combinations that are close, the one with the fractions nearest to the present ones is taken, and of equal
        ones the one with the lowest scores: a knapsack, where what a slot removes alone stands for what it adds.
        """
        before, now, width = list(trial.choices), trial.removed(), self.close / 8
        reached: dict[int, tuple[float, float, tuple[Choice, ...]]] = {0: (now, 0.0, ())}
        for moves in self._moves_apart(trial):
            states = reached.values()
            reached = {}
            for (total, cost, picks), (pick, more, change) in product(states, moves):
                place = round((total + more - self.target) / width)
                if place not in reached or cost + change < reached[place][1]:
                    reached[place] = total + more, cost + change, (*picks, pick)

        def miss(total: float, cost: float) -> tuple[float, float]:
            return max(abs(total - self.target), self.close), cost

        found = [(miss(now, 0.0), before)]
        for _, cost, picks in sorted(reached.values(), key=lambda state: miss(*state[:2]))[:_TRIED]:
            trial.choose_all(picks)
            found.append((miss(trial.removed(), cost), list(picks)))
        best = min(found, key=itemgetter(0))[1]
        trial.choose_all(best)
        return best != before

    def _moves_apart(self, trial: _Trial) -> Iterator[list[tuple[Choice, float, float]]]:
        """Yield the choices of each slot, what each removes more than the present one, and how far it is from it."""
        now, means = trial.removed(), _means(self.slots)
        for index, slot in enumerate(self.slots):
            present, moves = trial.choices[index], list[tuple[Choice, float, float]]()
            fraction = present[1] / slot.options[present[0]].size
            for i, option in enumerate(slot.options):
                counts = {option.nearest(part) for part in np.linspace(0, option.most, _TRIED)}
                for removed in sorted({*counts, present[1]} if i == present[0] else counts):
                    trial.choose(index, (i, removed))
                    score = float(option.scores[:removed].sum()) / means[slot.kind]
                    change = (removed / option.size - fraction) ** 2 + _TIE * score
                    moves.append(((i, removed), trial.removed() - now, change))
            trial.choose(index, present)
            yield moves

    def _repair_kind(self, trial: _Trial, kind: str) -> None:
        error = self.target - trial.removed()
        queue = self._moves(trial.choices, kind, up=error > 0)
        while queue:
            index, pick = queue.popleft()
            before = trial.choices[index]
            trial.choose(index, pick)
            left = self.target - trial.removed()
            if abs(left) >= abs(error):
                trial.choose(index, before)
                continue
            passed, error = (left > 0) != (error > 0), left
            if passed:
                break
            queue = queue or self._moves(trial.choices, kind, up=error > 0)

    def _moves(self, choices: list[Choice], kind: str, *, up: bool) -> deque[tuple[int, Choice]]:
        """One step more (or less) in each slot of ``kind``, lowest score first to remove, highest to give back."""
        found: list[tuple[float, int, Choice]] = []
        for index, (slot, (i, removed)) in enumerate(zip(self.slots, choices, strict=True)):
            if slot.kind != kind:
                continue
            if removed == 0 and up:
                i = next((j for j, option in enumerate(slot.options) if option.most), i)
            option = slot.options[i]
            new = option.more(removed) if up else option.less(removed)
            if new is None or new == removed:
                continue
            cost = float(option.scores[min(new, removed) : max(new, removed)].mean())
            found.append((cost if up else -cost, index, (i, new)))
        return deque((index, pick) for _, index, pick in sorted(found))

    def fraction(self, fixed: Mapping[int, Choice]) -> float:
        """Fraction of the units of slots not ``fixed`` that removes the rest of the target, by bisection."""

        def removed(fraction: float) -> float:
            firsts = [slot.options[0] for slot in self.slots]
            free = [(0, min(fraction * option.size, option.most)) for option in firsts]
            return self.removed([fixed.get(index, pick) for index, pick in enumerate(free)])

        low, high = 0.0, 1.0
        for _ in range(40):  # 2 ** -40 of a unit changes no rounded number
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle) < self.target else (low, middle)
        return (low + high) / 2

    def _kinds_by_unit(self) -> list[str]:
        """The kinds present, largest unit first."""
        cost: dict[str, float] = {}
        for slot in self.slots:
            one = removed_by(self.budget, [slot], [(0, slot.options[0].more(0) or 0)])
            cost[slot.kind] = max(cost.get(slot.kind, 0.0), one)
        return sorted(cost, key=lambda kind: -cost[kind])


class _Trial:
    """Choices under repair, and their removed cost, term by term of the budget.

    Changing one slot recomputes its terms alone; the sum is that of :meth:`BudgetSolver.removed` to the last bit.
    """

    def __init__(self, slots: Sequence[Slot], budget: Budget, choices: Sequence[Choice]) -> None:
        self.slots, self.budget, self.choices = slots, budget, list(choices)
        self.counts, self.blocks = left_by(slots, choices)
        self.terms = np.zeros(len(budget.terms))
        self._work_out([*self.counts, *self.blocks])

    def choose(self, index: int, pick: Choice) -> None:
        changed = set[Factor | str]()
        for choice in (self.choices[index], pick):
            changed.update(*left_by([self.slots[index]], [choice]))
        self.choices[index] = pick
        self.counts, self.blocks = left_by(self.slots, self.choices)
        self._work_out(changed)

    def choose_all(self, picks: Iterable[Choice]) -> None:
        for index, pick in enumerate(picks):
            self.choose(index, pick)

    def removed(self) -> float:
        return float(np.add.accumulate(self.terms)[-1])  # np.sum would add in another order

    def _work_out(self, changed: Iterable[Factor | str]) -> None:
        for place, gone in self.budget.removed_terms(changed, self.counts, self.blocks):
            self.terms[place] = gone
