"""The same widths in every layer, such that a stock config can say them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .base import Choice, Selection
from .slots import Slot, removed_layers, units_left

__all__ = ["choose_uniform"]

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
    return [fixed[number] for number in range(len(selection.slots))]


def _classes(selection: Selection) -> list[list[int]]:
    """Numbers of the slots that are alike but for their layer, those with the largest units first."""
    found: dict[object, list[int]] = {}
    for number, slot in enumerate(selection.slots):
        found.setdefault(_likeness(slot), []).append(number)
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
    for number in alike:
        choices[number] = (0, selection.slots[number].options[0].more(0) or 0)
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
