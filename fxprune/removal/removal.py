"""The removal decided for a graph, and the rescaling of its norms.

Selection decides a :class:`Removal`, and three steps apply it: removed blocks are bypassed (:class:`Bypassed`), tensors
are sliced (:class:`Sliced`), and sizes written in the graph are updated (:class:`Removed`). Each step consumes the fact
of the one before, so that none is left out or done twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch

from fxprune.axes import Keep, factors, kept_size
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.discovery.norms import KeptNorm
from fxprune.graph.facts import Change, Fact
from fxprune.removal.plan import Plan, kept_of_constants, plan_of
from fxprune.removal.scores import Scores
from fxprune.removal.target import Reached

__all__ = [
    "Bypassed",
    "Removal",
    "Removed",
    "RescaledNumber",
    "Scaling",
    "Sliced",
    "kept_norm_modules",
    "scaled_numbers",
    "scaled_weights",
    "unkept_norm_reasons",
]

_MOST_LINES = 6
"""Most reasons to list in a report."""


@dataclass(frozen=True)
class Scaling:
    """Scaling of a weight to which the graph adds an offset: ``w`` becomes ``(w + offset) factor - offset``."""

    factor: float
    offset: float = 0.0

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the scaled weight in its own dtype, computed in at least float32."""
        return self._of(weight).to(weight.dtype)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that scales exactly to the new values as rounded to its dtype, in at least float32.

        For a weight of that dtype it is the weight itself up to its last bits.
        """
        wide = self.of(weight).to(self._of(weight).dtype)
        return (wide + self.offset) / self.factor - self.offset

    def _of(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return (wide + self.offset) * self.factor - self.offset


@dataclass(frozen=True)
class RescaledNumber:
    """A number in the graph before and after a removal."""

    before: float
    after: float


def scaled_numbers(axes: AxisMap, keep: Keep) -> dict[tuple[str, tuple[Any, ...]], RescaledNumber]:
    """Return the numbers in the graph that change, by node name and argument path."""
    found = {}
    for norm, ratio in _touched(axes, keep):
        for number in norm.numbers:
            after = number.value * float(ratio) ** number.power
            found[number.node, number.path] = RescaledNumber(number.value, after)
    return found


def scaled_weights(axes: AxisMap, keep: Keep) -> dict[str, Scaling]:
    """Return the scaling of weights by name; tied weights are under one of their names."""
    found = {}
    for norm, ratio in _touched(axes, keep):
        found.update({w.name: Scaling(float(ratio) ** w.power, w.offset) for w in norm.weights})
    return found


def kept_norm_modules(axes: AxisMap, keep: Keep) -> tuple[str, ...]:
    """Return the modules whose norm loses units and is rescaled."""
    return tuple(axes.modules.get(norm.node) or norm.node for norm, _ in _touched(axes, keep))


def unkept_norm_reasons(axes: AxisMap, nodes: Collection[str]) -> tuple[str, ...]:
    """Describe why norms at some nodes are not rescaled; nothing unless ``norm="masked"``."""
    by_reason: dict[str, list[str]] = {}
    for node in nodes:
        if node in axes.unkept:
            by_reason.setdefault(axes.unkept[node], []).append(axes.modules.get(node) or node)
    lines = []
    for reason, places in list(by_reason.items())[:_MOST_LINES]:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"the norm in {places[0]}{more} is taken over the kept units: {reason}")
    return tuple(lines)


def _touched(axes: AxisMap, keep: Keep) -> list[tuple[KeptNorm, Fraction]]:
    """The rescaled norms over axes that lose units, each with the number of units per kept unit."""
    lost = {factor for factor in keep.units if keep.touches(factor)}
    found = []
    for norm in axes.norms:
        if any(lost.intersection(factors(expr)) for expr in norm.axes):
            found.append((norm, prod((Fraction(e.size, kept_size(e, keep)) for e in norm.axes), start=Fraction(1))))
    return found


@dataclass(frozen=True, eq=False)
class Removal(Fact):
    """The kept units and removed blocks of a graph.

    Args:
        axes: the solved axes of the graph, before the removal.
        keep: the kept units of each factor that loses some.
        removed_blocks: module paths of blocks removed as a whole.
        asked: the requested ``ratio`` or ``group_ratio``, for the report.
        scores: the scores that decided it, if any.
        reached: what became of the target, if there was one.
    """

    about: ClassVar[Change] = "graph"
    axes: AxisMap
    groups: tuple[Group, ...]
    keep: Keep
    removed_blocks: tuple[str, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None
    reached: Reached | None = None

    @cached_property
    def plan(self) -> Plan:
        """The removal in a portable form: kept indices by parameter."""
        return plan_of(self.axes, self.keep, self.removed_blocks)

    @cached_property
    def kept(self) -> dict[str, Mapping[int, list[int]]]:
        """Kept indices of every tensor the graph reads, constants included."""
        return {**self.plan.kept, **kept_of_constants(self.axes, self.keep)}

    @cached_property
    def scaled(self) -> dict[str, Scaling]:
        return scaled_weights(self.axes, self.keep)


@dataclass(frozen=True, eq=False)
class _RemovalStep(Fact):
    removal: Removal


class Bypassed(_RemovalStep):
    """The first step of a removal is done: removed blocks are bypassed; tensors are whole."""


class Sliced(_RemovalStep):
    """The second step of a removal is done: tensors are sliced; sizes in the graph are still those before it."""


class Removed(_RemovalStep):
    """The last step of a removal is done: the graph is slim and can run."""
