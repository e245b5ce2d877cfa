"""Slots: places where a number of units has to be chosen.

A slot is one group, or the groups of which just one may shrink (whole key/value groups, or query heads inside each;
experts of every group of a router, or whole groups), or all the layers that may go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.axes import Factor, Keep
from fxprune.discovery.groups import Group
from fxprune.removal.scores import Scores

from .rounding import Rounding

__all__ = [
    "Option",
    "Slot",
    "default_protect",
    "make_keep",
    "make_slots",
    "protected_blocks",
    "removed_layers",
    "units_left",
]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to shrink a slot.

    Args:
        size: number of units.
        step: kept counts are multiples of this many units.
        scores: score of the cheapest unit, the next cheapest, ..: ``(size,)``, averaged over outer units.
        group: what shrinks; None for layers.
    """

    size: int
    step: int
    scores: Array
    group: Group | None = None

    @property
    def fewest(self) -> int:
        """The smallest number of units that may stay: a multiple of ``step``."""
        least = 1 if self.group is None else self.group.least
        return -(-least // self.step) * self.step

    @property
    def most(self) -> int:
        """The largest number of units that may go."""
        return max(self.size - self.fewest, 0)

    def nearest(self, removed: float) -> int:
        """The allowed number of units nearest to ``removed``."""
        kept = max(round((self.size - removed) / self.step) * self.step, self.fewest)
        allowed = min(max(self.size - kept, 0), self.most)
        return allowed if removed >= allowed - removed else 0

    def below(self, removed: float) -> int:
        """The largest allowed number of units that is not above ``removed``."""
        allowed = self.nearest(removed)
        return allowed if allowed <= removed else self.less(allowed)

    def more(self, removed: int) -> int | None:
        """The next larger allowed number; None at the end."""
        if removed >= self.most:
            return None
        left = self.size - removed
        return removed + (left % self.step or self.step)

    def less(self, removed: int) -> int:
        """The next smaller allowed number; 0 at the end."""
        left = self.size - removed + self.step
        return 0 if left >= self.size else self.size - left


@dataclass(frozen=True)
class Slot:
    """A place where units go.

    Args:
        kind: kind of its groups.
        options: the ways to shrink it, of which one is chosen; the first is preferred where equally near.
        layers: for the slot of layers, the layer groups, cheapest first.
    """

    kind: str
    options: tuple[Option, ...]
    layers: tuple[Group, ...] = ()

    def choose(self, fraction: float) -> tuple[int, int]:
        """Option and number of units that come nearest to ``fraction``."""
        picks = [(i, option.nearest(fraction * option.size)) for i, option in enumerate(self.options)]
        return min(picks, key=lambda pick: (abs(pick[1] / self.options[pick[0]].size - fraction), pick[0]))


def default_protect(depth: int) -> tuple[int, int]:
    """The paper's protected layers, 4 at the front and 2 at the end of 32, scaled to ``depth``."""
    return round(depth * 4 / 32), round(depth * 2 / 32)


def protected_blocks(blocks: Sequence[str], protect: tuple[float, float] | tuple[()] | None) -> frozenset[str]:
    """The blocks that stay whole: ``protect`` of them at the front and at the end; of one below 1 that fraction."""
    wanted = default_protect(len(blocks)) if protect is None else protect or (0, 0)
    front, back = (int(part) if part >= 1 else round(part * len(blocks)) for part in wanted)
    return frozenset((*blocks[:front], *blocks[max(len(blocks) - back, 0) :]))


def make_slots(
    groups: Sequence[Group], scores: Scores, kinds: Sequence[str], protected: frozenset[str], rounding: Rounding
) -> list[Slot]:
    """The slots of ``kinds`` outside ``protected`` blocks."""
    chosen = [g for g in groups if g.is_of(kinds) and g.block not in protected and g.name in scores.units]
    shared: dict[tuple[str, object], list[Option]] = {}
    for group in chosen:
        if group.factor is not None:
            shared.setdefault((group.kind, _place(group)), []).append(_option(group, scores, rounding))
    slots = [Slot(kind, tuple(sorted(options, key=_preference))) for (kind, _), options in shared.items()]
    layers = [group for group in chosen if group.kind == "layer"]
    if layers:
        layers.sort(key=lambda group: float(scores.units[group.name][0]))
        ordered = np.asarray([scores.units[group.name][0] for group in layers])
        slots.append(Slot("layer", (Option(len(layers), 1, ordered),), tuple(layers)))
    return [slot for slot in slots if any(option.most for option in slot.options)]


def make_keep(slots: Sequence[Slot], choices: Sequence[tuple[int, int]], scores: Scores) -> Keep:
    """Keep all but the lowest scores, as many as chosen in each slot."""
    units: dict[Factor, npt.NDArray[np.bool_]] = {}
    outer: dict[Factor, Factor] = {}
    for slot, (i, removed) in zip(slots, choices, strict=True):
        group = slot.options[i].group
        if group is None or group.factor is None or not removed:
            continue
        rank = np.argsort(np.argsort(scores.units[group.name], axis=-1, kind="stable"), axis=-1)
        units[group.factor] = rank >= removed
        if group.outer is not None:
            outer[group.factor] = group.outer
    return Keep(units, outer)


def removed_layers(slots: Sequence[Slot], choices: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Blocks that go as a whole."""
    picked = [g for slot, (_, n) in zip(slots, choices, strict=True) for g in slot.layers[:n]]
    return tuple(group.block for group in picked if group.block is not None)


def units_left(slots: Sequence[Slot], fractions: Mapping[int, tuple[int, float]]) -> dict[Factor, float]:
    """Units left of each factor, for each slot number an option and a (possibly fractional) number removed."""
    left: dict[Factor, float] = {}
    for slot, (i, removed) in fractions.items():
        group = slots[slot].options[i].group
        if group is not None and group.factor is not None and removed:
            left[group.factor] = group.size - removed
    return left


def _place(group: Group) -> object:
    """What groups of one slot have in common."""
    if group.kind == "head" and group.outer is not None:
        return group.outer
    return (group.members[0].name, group.members[0].axis) if group.kind == "expert" else group.factor


def _preference(option: Option) -> tuple[bool, int]:
    """Those with a choice in each outer unit come last, those with more units first."""
    return option.group is not None and option.group.outer is not None, -option.size


def _option(group: Group, scores: Scores, rounding: Rounding) -> Option:
    table = np.sort(scores.units[group.name], axis=-1)
    return Option(group.size, rounding.step(group), table.reshape(-1, group.size).mean(axis=0), group)
