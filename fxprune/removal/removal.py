"""A removal decided for a graph, and how its norms are kept.

Selection decides a :class:`Removal`, and three steps carry it out. The graph goes around the blocks that are removed
(:class:`Bypassed`), its tensors are cut (:class:`Sliced`), and the sizes written in it are made to fit
(:class:`Removed`). Each step uses up the fact of the one before, so that none is left out or done twice.
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

__all__ = [
    "Bypassed",
    "Removal",
    "Removed",
    "RescaledNumber",
    "Scaling",
    "Sliced",
    "kept_in",
    "scaled_numbers",
    "scaled_weights",
    "unkept_in",
]

_MOST_LINES = 6
"""Reasons that a reader of a report can still take in."""


@dataclass(frozen=True)
class Scaling:
    """How the values of a weight change: ``w`` becomes ``(w + offset) factor - offset``.

    Args:
        factor: what is multiplied with.
        offset: what the graph adds to the weight before it multiplies with it.
    """

    factor: float
    offset: float = 0.0

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new values of a weight in its own dtype, worked out in float32 at least."""
        return self._of(weight).to(weight.dtype)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the values that a weight would have had to have for the new ones, which are rounded to its dtype.

        They are in float32 at least. In that dtype it is ``weight`` itself up to its last bits.
        """
        wide = self.of(weight).to(self._of(weight).dtype)
        return (wide + self.offset) / self.factor - self.offset

    def _of(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return (wide + self.offset) * self.factor - self.offset


@dataclass(frozen=True)
class RescaledNumber:
    """A number before and after."""

    before: float
    after: float


def scaled_numbers(axes: AxisMap, keep: Keep) -> dict[tuple[str, tuple[Any, ...]], RescaledNumber]:
    """Return how numbers in the graph change: by the name of a node and where in it they stand."""
    found = {}
    for norm, ratio in _touched(axes, keep):
        for number in norm.numbers:
            after = number.value * float(ratio) ** number.power
            found[number.node, number.path] = RescaledNumber(number.value, after)
    return found


def scaled_weights(axes: AxisMap, keep: Keep) -> dict[str, Scaling]:
    """Return how weights change, by name; of those that are one tensor under several names, under one of them."""
    found = {}
    for norm, ratio in _touched(axes, keep):
        found.update({w.name: Scaling(float(ratio) ** w.power, w.offset) for w in norm.weights})
    return found


def kept_in(axes: AxisMap, keep: Keep) -> tuple[str, ...]:
    """Return the modules whose norm runs over units that went, and is kept as masking has it."""
    return tuple(axes.modules.get(norm.node) or norm.node for norm, _ in _touched(axes, keep))


def unkept_in(axes: AxisMap, nodes: Collection[str]) -> tuple[str, ...]:
    """Return in words why norms at some nodes are not kept as masking has them; nothing where none was to be."""
    by_reason: dict[str, list[str]] = {}
    for node in nodes:
        if node in axes.unkept:
            by_reason.setdefault(axes.unkept[node], []).append(axes.modules.get(node) or node)
    lines = []
    for reason, places in list(by_reason.items())[:_MOST_LINES]:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"the norm in {places[0]}{more} is taken over the units that stay: {reason}")
    return tuple(lines)


def _touched(axes: AxisMap, keep: Keep) -> list[tuple[KeptNorm, Fraction]]:
    """The kept norms over axes that lose units, with how many units there were for each that stays."""
    lost = {factor for factor in keep.units if keep.touches(factor)}
    found = []
    for norm in axes.norms:
        if any(lost.intersection(factors(expr)) for expr in norm.axes):
            found.append((norm, prod((Fraction(e.size, kept_size(e, keep)) for e in norm.axes), start=Fraction(1))))
    return found


@dataclass(frozen=True, eq=False)
class Removal(Fact):
    """Which units of a graph stay, and which blocks go.

    Args:
        axes: the solved axes of the graph, before the removal.
        groups: its groups.
        keep: the kept units of each factor that loses some.
        removed_blocks: module paths of blocks that go as a whole.
        asked: what selection was asked for, for the report: ``ratio`` or ``group_ratio``.
        scores: what it was decided by; None where it was not by scores.
    """

    about: ClassVar[Change] = "graph"
    axes: AxisMap
    groups: tuple[Group, ...]
    keep: Keep
    removed_blocks: tuple[str, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None

    @cached_property
    def plan(self) -> Plan:
        """The removal in a portable form: kept indices by parameter."""
        return plan_of(self.axes, self.keep, self.removed_blocks)

    @cached_property
    def kept(self) -> dict[str, Mapping[int, list[int]]]:
        """Kept indices of every tensor the graph reads, what the model's code makes included."""
        return {**self.plan.kept, **kept_of_constants(self.axes, self.keep)}

    @cached_property
    def scaled(self) -> dict[str, Scaling]:
        """How the weights of norms change that are kept as masking has them."""
        return scaled_weights(self.axes, self.keep)


@dataclass(frozen=True, eq=False)
class Bypassed(Fact):
    """The first step of a removal: the graph goes around the blocks that it takes; tensors are whole.

    Args:
        removal: what is carried out.
    """

    removal: Removal


@dataclass(frozen=True, eq=False)
class Sliced(Fact):
    """The second step of a removal: tensors are cut to what it leaves; the sizes in the graph are those before it.

    Args:
        removal: what is carried out.
    """

    removal: Removal


@dataclass(frozen=True, eq=False)
class Removed(Fact):
    """The last step of a removal: the graph is slim and computes.

    Args:
        removal: what was carried out, in terms of the graph before it.
    """

    removal: Removal
