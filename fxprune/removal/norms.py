"""The numbers and weights of a graph that change where norms are kept as masking has them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch

from fxprune.axes import Keep, factors, kept_size
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.norms import KeptNorm

__all__ = ["Change", "Scaling", "kept_in", "scaled_numbers", "scaled_weights", "unkept_in"]

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
class Change:
    """A number before and after."""

    before: float
    after: float


def scaled_numbers(axes: AxisMap, keep: Keep) -> dict[tuple[str, tuple[Any, ...]], Change]:
    """Return how numbers in the graph change: by the name of a node and where in it they stand."""
    found = {}
    for norm, ratio in _touched(axes, keep):
        for number in norm.numbers:
            after = number.value * float(ratio) ** number.power
            found[number.node, number.path] = Change(number.value, after)
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
