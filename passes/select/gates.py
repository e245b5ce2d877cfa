"""A gate and a scale for each unit, and the mask that the budget leaves of the gates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxprune.discovery.consumers import Consumer, consumers_of, find_consumers, units_at
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import device_of
from fxprune.masking.gated_run import spread_gates
from fxprune.removal.scores import Scores

from .base import Choice, Selection
from .solver import Solver

__all__ = ["Gates", "project"]

_SOFTNESS = 1.5
"""Over which numbers turn a gate from closed to open."""

_SPREAD = 3.0
"""Between the numbers of the least and the most important unit of a group, to begin with."""

_REACH = 0.5
"""A scale stays between a half and one and a half."""


class Gates:
    """Numbers of all units of all slots, one slot after the other.

    Args:
        selection: whose slots; of each the first option has gates.
        begun: choices that the gates give to begin with, as near as they can.
        scales: whether units have scales.
    """

    def __init__(self, selection: Selection, begun: Sequence[Choice], scales: bool) -> None:
        self.selection = selection
        self.groups = []
        for slot in selection.slots:
            group = slot.options[0].group
            assert group is not None
            self.groups.append(group)
        graph_module = selection.graph_module
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        self.begins = np.cumsum([0, *(group.size for group in self.groups)])
        self.places: list[tuple[int, Consumer, np.ndarray[tuple[int], np.dtype[np.int64]]]] = []
        for i, group in enumerate(self.groups):
            own = consumers_of(group, consumers) if group.outer is None else ()
            if not own:
                raise PassError(
                    f"{group.name}, of the kind {group.kind!r}, has no place for gates",
                    where="gates",
                    remedy="Leave that kind out",
                )
            self.places += [(i, consumer, units_at(group, consumer, axes)) for consumer in own]
        device = device_of(graph_module)
        self.numbers = torch.cat([*map(self._first, range(len(self.groups)), begun)]).to(device).requires_grad_()
        self.scales = torch.zeros_like(self.numbers, requires_grad=scales)
        self.costs, self.forced, self.target = self._costs(begun)
        self.learned = [self.numbers, *([self.scales] if scales else [])]

    def by_consumer(self) -> dict[Consumer, torch.Tensor]:
        """Return what multiplies each input of each consumer: the mask, with the gates' gradient, times scales."""
        p = torch.sigmoid(self.numbers / _SOFTNESS)
        gates = (self.mask() + (p - p.detach())) * (1 + _REACH * torch.tanh(self.scales))
        found: dict[Consumer, torch.Tensor] = {}
        for i, consumer, units in self.places:
            spread = spread_gates(gates[self.begins[i] : self.begins[i + 1]], units)
            found[consumer] = found[consumer] * spread if consumer in found else spread
        return found

    def mask(self) -> torch.Tensor:
        """Return 1 for each unit that stays and 0 for the others: ``(units,)``."""
        numbers = self.numbers.detach().cpu().double().numpy()
        kept = project(numbers, self.costs, self.target, self._forced(numbers))
        return torch.from_numpy(kept).to(self.numbers)

    def choices(self) -> list[Choice]:
        """Return how many units of each slot go, rounded to what may stay."""
        gone = 1 - self.mask().cpu().numpy()
        counts = [int(gone[self.begins[i] : self.begins[i + 1]].sum()) for i in range(len(self.groups))]
        return [(0, slot.options[0].nearest(n)) for slot, n in zip(self.selection.slots, counts, strict=True)]

    def scores(self) -> Scores:
        """Return the numbers as scores; other options of the slots keep theirs."""
        numbers = self.numbers.detach().cpu().double().numpy()
        own = {g.name: numbers[self.begins[i] : self.begins[i + 1]] for i, g in enumerate(self.groups)}
        return Scores({**self.selection.scores.units, **own}, "select-by-gates")

    def _first(self, i: int, choice: Choice) -> torch.Tensor:
        """Numbers in the order of the scores, 0 between what goes and what stays."""
        scores = self.selection.scores.units[self.groups[i].name]
        rank = np.argsort(np.argsort(scores, kind="stable"))
        count = choice[1] if choice[0] == 0 else 0
        return torch.from_numpy(_SPREAD * (rank - count + 0.5) / len(rank)).float()

    def _costs(self, begun: Sequence[Choice]) -> tuple[np.ndarray, list[int], float]:
        """What each unit costs, how many of each slot have to stay, and how much has to go."""
        solver = Solver(self.selection, 0.0)
        none = [(0, 0)] * len(self.groups)
        costs = []
        for i, slot in enumerate(self.selection.slots):
            most = slot.options[0].most
            alone = solver.removed([*none[:i], (0, most), *none[i + 1 :]])
            costs.append(np.full(self.groups[i].size, alone / max(most, 1)))
        fewest = [slot.options[0].size - slot.options[0].most for slot in self.selection.slots]
        return np.concatenate(costs), fewest, solver.removed(begun)

    def _forced(self, numbers: np.ndarray) -> np.ndarray:
        """The units that stay in any case: the best of each slot."""
        forced = np.zeros(len(numbers), dtype=bool)
        for i, fewest in enumerate(self.forced):
            begin, end = self.begins[i], self.begins[i + 1]
            forced[begin + np.argsort(numbers[begin:end])[-fewest:]] = True
        return forced


def project(
    numbers: np.ndarray,
    costs: np.ndarray,
    target: float,
    forced: np.ndarray,
) -> np.ndarray:
    """Return which units stay, 1 or 0: the smallest numbers go until as much has gone as has to.

    Args:
        numbers: of all units, ``(units,)``.
        costs: what goes with each.
        target: how much has to go.
        forced: units that stay in any case.
    """
    order = np.argsort(numbers, kind="stable")
    order = order[~forced[order]]
    gone = np.cumsum(costs[order])
    count = int(np.searchsorted(gone, target * (1 - 1e-9)))
    # one more if that comes nearer to the target
    if count < len(order):
        before = gone[count - 1] if count else 0.0
        count += int(abs(gone[count] - target) <= abs(before - target))
    kept = np.ones(len(numbers))
    kept[order[:count]] = 0
    return kept
