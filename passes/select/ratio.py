"""Selection by a ratio of parameters, or of the units of every group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from fxprune.discovery.groups import as_kinds, bare_kind
from fxprune.errors import RatioError
from fxprune.pipeline.arguments import number
from fxprune.removal.removal import Removal

from .base import (
    Array,
    Choice,
    Selection,
    SelectPass,
    Slot,
    as_pairs,
    of_kind,
    read_by_kind,
    removed_layers,
    units_left,
)

__all__ = [
    "CLOSE",
    "BudgetSolver",
    "SelectByGroupRatioPass",
    "SelectByRatioPass",
    "choose_uniform",
    "count_below",
    "normalised",
]


def normalised(slots: Sequence[Slot]) -> list[Array]:
    """The scores of each slot's first option, cheapest first, divided by the mean magnitude of all of its kind."""
    rows = [slot.options[0].scores for slot in slots]
    means = {
        kind: float(
            np.abs(np.concatenate([row for slot, row in zip(slots, rows, strict=True) if slot.kind == kind])).mean()
        )
        for kind in {slot.kind for slot in slots}
    }
    return [row / (means[slot.kind] or 1.0) for slot, row in zip(slots, rows, strict=True)]


def count_below(slot: Slot, values: Array, threshold: float) -> int:
    """How many units of ``slot`` go when those scored below ``threshold`` do."""
    return slot.options[0].below(int((values < threshold).sum()))


CLOSE = 0.005
"""Half a percentage point: how near the achieved ratio has to be where the units are small enough."""

_HALVINGS = 40
"""2 ** -40 of a unit is nothing: more halvings change no rounded index."""


class BudgetSolver:
    """Finds numbers of units that remove a index of parameters, or of whatever the budget counts.

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
        for index, slot in enumerate(self.slots):
            picks = [(i, option.most) for i, option in enumerate(slot.options)]
            best.append(max(picks, key=lambda pick: self._alone(index, pick)))
        return best

    def local(self) -> list[Choice]:
        """The same fraction everywhere, times the share, kinds with the largest units rounded first."""
        fixed: dict[int, Choice] = {}
        for kind in self._kinds_by_unit():
            fraction = self.fraction(fixed)
            for index, slot in enumerate(self.slots):
                if slot.kind == kind:
                    fixed[index] = slot.choose(min(fraction * self.shares[index], 1.0))
        return [fixed[index] for index in range(len(self.slots))]

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
        """Move single units, cheapest first, as long as each brings the index nearer to the target.

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
            index, pick = queue.pop(0)
            trial = [*choices[:index], pick, *choices[index + 1 :]]
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
        for index, (slot, (i, removed)) in enumerate(zip(self.slots, choices, strict=True)):
            if slot.kind != kind or not self.shares[index]:
                continue
            if removed == 0 and up:
                i = next((j for j, option in enumerate(slot.options) if option.most), i)
            option = slot.options[i]
            new = option.more(removed) if up else option.less(removed)
            if new is None or new == removed:
                continue
            cost = float(option.scores[min(new, removed) : max(new, removed)].mean())
            found.append((cost if up else -cost, index, (i, new)))
        return [(index, pick) for _, index, pick in sorted(found)]

    def fraction(self, fixed: Mapping[int, Choice]) -> float:
        """The fraction of units of the slots not ``fixed`` that removes what is left to remove."""

        def choices(fraction: float) -> list[tuple[int, float]]:
            firsts = [(slot.options[0], share) for slot, share in zip(self.slots, self.shares, strict=True)]
            free = [(0, min(fraction * share * option.size, option.most)) for option, share in firsts]
            return [fixed.get(index, pick) for index, pick in enumerate(free)]

        largest = 1 / min((share for share in self.shares if share), default=1.0)
        return _bisect(lambda fraction: self.removed(choices(fraction)), self.target, max(largest, 1.0))

    def _kinds_by_unit(self) -> list[str]:
        """The kinds present, largest unit first."""
        cost: dict[str, float] = {}
        for index, slot in enumerate(self.slots):
            cost[slot.kind] = max(cost.get(slot.kind, 0.0), self._alone(index, (0, slot.options[0].more(0) or 0)))
        return sorted(cost, key=lambda kind: -cost[kind])

    def _alone(self, index: int, pick: Choice) -> float:
        """Parameters removed by one slot's choice alone."""
        return self.removed([pick if i == index else (0, 0) for i in range(len(self.slots))])


def _bisect(function: Callable[[float], float], target: float, high: float) -> float:
    """Where a growing function on [0, high] takes the value ``target``; an end where it never does."""
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


_MOST_TRIALS = 40
"""A trial builds the model on ``meta``; a width that fits, if any does, is found among the nearest few."""


def choose_uniform(selection: Selection, fraction_for: Callable[[Mapping[int, Choice], str], float]) -> list[Choice]:
    """Slots that are alike get the same choice: the nearest to the fraction wanted that the stock config accepts.

    Kinds with large units come first, so that the small ones make up for what rounding leaves.

    Args:
        selection: what to choose from.
        fraction_for: the fraction of units wanted of the slots of a kind that have no choice yet, given the others'.
    """
    fixed: dict[int, Choice] = {}
    for alike in _classes(selection):
        slot = selection.slots[alike[0]]
        fraction = fraction_for(fixed, slot.kind)
        for pick in _nearest(slot, fraction):
            trial = {**fixed, **dict.fromkeys(alike, pick)}
            if pick[1] == 0 or _accepts(selection, trial):
                fixed = trial
                break
        else:
            fixed |= dict.fromkeys(alike, (0, 0))
        if fixed[alike[0]][1] == 0 and fraction > 0:
            selection.note(f"{slot.kind} stays whole: no width near the ratio fits the stock config")
    return [fixed[index] for index in range(len(selection.slots))]


def _classes(selection: Selection) -> list[list[int]]:
    """Numbers of the slots that are alike but for their layer, those with the largest units first."""
    found: dict[object, list[int]] = {}
    for index, slot in enumerate(selection.slots):
        found.setdefault(_likeness(slot), []).append(index)
    return sorted(found.values(), key=lambda alike: -_unit(selection, alike))


def _likeness(slot: Slot) -> object:
    names = []
    for option in slot.options:
        group = option.group
        place = "" if group is None or group.block is None else group.name.removeprefix(group.block)
        names.append((place or (group.name if group is not None else ""), option.size, option.step))
    return slot.kind, tuple(names)


def _unit(selection: Selection, alike: list[int]) -> float:
    """Parameters in one unit of each of the slots."""
    choices = [(0, 0)] * len(selection.slots)
    for index in alike:
        choices[index] = (0, selection.slots[index].options[0].more(0) or 0)
    left = units_left(selection.slots, dict(enumerate(choices)))
    return selection.budget.removed(left, dict.fromkeys(removed_layers(selection.slots, choices), 1.0))


def _nearest(slot: Slot, fraction: float) -> Iterator[Choice]:
    """Choices for a slot, those nearest to the fraction first."""
    found: list[tuple[float, int, int]] = []
    for i, option in enumerate(slot.options):
        removed: int | None = 0
        while removed is not None:
            found.append((abs(removed / option.size - fraction), i, removed))
            removed = option.more(removed)
    for _, i, removed in sorted(found)[:_MOST_TRIALS]:
        yield i, removed


def _accepts(selection: Selection, choices: Mapping[int, Choice]) -> bool:
    return selection.accepts(selection.removal_for([choices.get(n, (0, 0)) for n in range(len(selection.slots))]).plan)


_FAR = 0.05
"""How much less than the ratio may go where only some widths are allowed."""

_ENOUGH = 0.75
"""The most of the units of the kinds that come first that may go before the others shrink too: what is left of a layer
that loses more does little, and a few heads are then the smaller loss."""


@dataclass(frozen=True, eq=False)
class SelectByRatioPass(SelectPass):
    """The fraction ``ratio`` of the model's parameters goes.

    Local ranking solves for the one fraction of units that removes it, rounds the kinds with large units first, solves
    again for the rest, and settles what is left unit by unit where it costs least.

    Args:
        ratio: fraction of all parameters, in [0, 1). By kind, as in ``{"mlp": 0.3, "head": 0.1}``: the fraction of the
            parameters in structures of that kind, in all layers together; these are then the kinds that shrink.
        first: kinds that shrink alone, as long as no more than three quarters of their units have to go; past that, and
            in models without any, all ``kinds`` shrink.
    """

    name: ClassVar[str] = "select-by-ratio"
    ratio: float | tuple[tuple[str, float], ...] = 0.2
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        value = read_by_kind("ratio", self.ratio, partial(number, least=0, below=1, error=RatioError))
        object.__setattr__(self, "ratio", value)
        object.__setattr__(self, "kinds", as_pairs(value) or self.kinds)
        object.__setattr__(self, "first", as_kinds(self.first, "first") if self.first != () else ())
        super().__post_init__()

    @property
    def asked(self) -> dict[str, float]:
        """The ratio, where there is one for all kinds, of all parameters."""
        return {} if isinstance(self.ratio, tuple) or self.budget != "params" else {"ratio": self.ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        """As many units from each slot as make the ratio, of each kind where it is given by kind.

        Raises:
            RatioError: even with one unit left in every group, less than the ratio goes.
        """
        if not isinstance(self.ratio, tuple):
            total = selection.budget.total
            first = _places(selection, self.first)
            if first and BudgetSolver(_part(selection, first), self.ratio * total).fraction({}) <= _ENOUGH:
                return self._of_part(selection, first, [(0, 0)] * len(selection.slots), self.ratio, total)
            return self._choose(selection, self.ratio, total)
        decided = [(0, 0)] * len(selection.slots)
        for spelled, ratio in self.ratio:
            kind = bare_kind(spelled)
            whole = selection.sizes.get(kind, 0.0)
            decided = self._of_part(selection, _places(selection, (kind,)), decided, ratio, whole)
        return decided

    def _of_part(
        self, selection: Selection, places: Sequence[int], decided: Sequence[Choice], ratio: float, whole: float
    ) -> list[Choice]:
        """What is ``decided``, and for the slots at ``places`` what removes the fraction ``ratio`` of ``whole``."""
        choices = dict(zip(places, self._choose(_part(selection, places, decided), ratio, whole), strict=True))
        return [choices.get(place, choice) for place, choice in enumerate(decided)]

    def _choose(self, selection: Selection, ratio: float, whole: float) -> list[Choice]:
        """Choices that remove the fraction ``ratio`` of ``whole`` parameters."""
        solver = BudgetSolver(selection, ratio * whole)
        largest = solver.removed(solver.most()) / max(whole, 1)
        if ratio > largest + CLOSE:
            raise self._too_large(f"{ratio:.1%} of the {selection.budget.word}", largest)
        if self.uniform:
            choices = choose_uniform(selection, lambda fixed, _: solver.fraction(fixed))
        else:
            choices = solver.repair(solver.local() if self.ranking == "local" else solver.globally())
        achieved = solver.removed(choices) / max(whole, 1)
        if self.uniform and ratio - achieved > _FAR:
            raise RatioError(
                f"{ratio:.1%} of the {selection.budget.word} cannot go with the same widths in all layers: "
                f"with kinds={self.kinds} the stock config takes {achieved:.1%}",
                where="uniform",
                remedy="Leave out uniform; the checkpoint then carries a modelling file of its own",
            )
        if self.budget != "params":
            selection.note(f"{achieved:.1%} of {whole:,.0f} {selection.budget.word} went")
        if abs(achieved - ratio) > CLOSE:
            selection.note(f"ratio {achieved:.2%} instead of {ratio:.2%}: the units are too large to come nearer")
        return choices

    def _too_large(self, asked: str, largest: float) -> RatioError:
        """The error of a ratio that cannot be reached, with what keeps it from being larger."""
        names = ("protect", "round_to", "tensor_parallel")
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        said = [f"{name}={getattr(self, name)}" for name in ("kinds", *changed)]
        error = RatioError(
            f"{asked} cannot go: with {', '.join(said)} the largest reachable ratio is {largest:.1%}",
            where="ratio",
            remedy="Ask for less, protect fewer layers or allow more kinds",
        )
        error.reachable = largest
        return error


def _places(selection: Selection, kinds: Sequence[str]) -> list[int]:
    return [place for place, slot in enumerate(selection.slots) if slot.kind in kinds]


def _part(selection: Selection, places: Sequence[int], decided: Sequence[Choice] = ()) -> Selection:
    """The selection of some slots alone, the others being ``decided``."""

    def removal_for(choices: Sequence[Choice]) -> Removal:
        chosen = dict(zip(places, choices, strict=True))
        return selection.removal_for([chosen.get(place, choice) for place, choice in enumerate(decided)])

    return replace(selection, slots=[selection.slots[place] for place in places], removal_for=removal_for)


@dataclass(frozen=True, eq=False)
class SelectByGroupRatioPass(SelectPass):
    """From every group the fraction ``group_ratio`` of its units goes, rounded to what is nearest.

    Source: LLM-Pruner's ``--pruning_ratio``. With ``global`` ranking it is the fraction of all units of a kind.

    Args:
        group_ratio: fraction of units, in [0, 1); by kind too, as in ``{"mlp": 0.3, "head": 0.1}``, which are then the
            kinds that shrink.
    """

    name: ClassVar[str] = "select-by-group-ratio"
    group_ratio: float | tuple[tuple[str, float], ...] = 0.25

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        value = read_by_kind("group_ratio", self.group_ratio, partial(number, least=0, below=1, error=RatioError))
        object.__setattr__(self, "group_ratio", value)
        object.__setattr__(self, "kinds", as_pairs(value) or self.kinds)
        super().__post_init__()

    @property
    def asked(self) -> dict[str, float]:
        """The group ratio, where there is one for all kinds."""
        return {} if isinstance(self.group_ratio, tuple) else {"group_ratio": self.group_ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        """The same fraction of each slot, or of each kind's units in order of their scores."""
        ratio = {slot.kind: of_kind(self.group_ratio, slot.kind, 0.0) for slot in selection.slots}
        if self.uniform:
            return choose_uniform(selection, lambda _, kind: ratio[kind])
        if self.ranking == "local":
            return [slot.choose(ratio[slot.kind]) for slot in selection.slots]
        values = normalised(selection.slots)
        cut: dict[str, float] = {}
        for kind in {slot.kind for slot in selection.slots}:
            pool = sorted(
                v for slot, row in zip(selection.slots, values, strict=True) if slot.kind == kind for v in row
            )
            index = round(ratio[kind] * len(pool))
            cut[kind] = pool[index] if index < len(pool) else float("inf")
        return [(0, count_below(slot, row, cut[slot.kind])) for slot, row in zip(selection.slots, values, strict=True)]
