"""Counting parameters: what is left of a model for given numbers of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from fxprune.axes import Concat, Expr, Factor, factors
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.graph.blocks import owner_block

__all__ = ["ParameterBudget", "parameters_by_kind"]

Counts = Mapping[Factor, float]


class ParameterBudget:
    """The number of parameters of a model as a function of unit counts; tied parameters count once.

    The count is a polynomial: the product over axes of their sizes, summed over parameters. Fractional counts are
    allowed, so that a ratio can be solved for before it is rounded.
    """

    def __init__(self, axes: AxisMap) -> None:
        self._shapes: list[tuple[tuple[Expr, ...], frozenset[Factor], str | None, float]] = []
        for name in axes.parameters:
            if name in axes.tied:
                continue
            exprs = axes.tensors[name]
            touched = frozenset(factor for expr in exprs for factor in factors(expr))
            size = prod(expr.size for expr in exprs)
            self._shapes.append((exprs, touched, owner_block(name, axes.blocks), size))
        self.total = int(sum(size for *_, size in self._shapes))

    def removed(self, counts: Counts, blocks: Mapping[str, float]) -> float:
        """Parameters that go.

        Args:
            counts: units left of each factor that shrinks.
            blocks: for each block that goes, the fraction of it that goes (1, or less while solving).
        """
        gone = 0.0
        for exprs, touched, block, size in self._shapes:
            share = blocks.get(block, 0.0) if block is not None else 0.0
            if share == 0.0 and touched.isdisjoint(counts):
                continue
            left = prod(_size(expr, counts) for expr in exprs) * (1 - share)
            gone += size - left
        return gone


def parameters_by_kind(budget: ParameterBudget, groups: Sequence[Group]) -> dict[str, float]:
    """Return the parameters in the structures of each kind: what would go with all of its ``groups``."""
    found: dict[str, float] = {}
    for kind in {group.kind for group in groups}:
        alike = [group for group in groups if group.kind == kind]
        counts = {group.factor: 0.0 for group in alike if group.factor is not None}
        blocks = {group.block: 1.0 for group in alike if group.factor is None and group.block is not None}
        found[kind] = budget.removed(counts, blocks)
    return found


def _size(expr: Expr, counts: Counts) -> float:
    if isinstance(expr, Factor):
        return counts.get(expr, expr.size)
    sizes = [_size(part, counts) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)
