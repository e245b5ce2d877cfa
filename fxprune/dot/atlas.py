"""A dependency graph with the indices that pictures of it need."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import networkx as nx

from fxprune.axes import Factor, factors
from fxprune.dependency import AxisMap, axis_map
from fxprune.groups import Group, find_groups
from fxprune.rules.base import Axis

__all__ = ["Atlas"]


class _Use(NamedTuple):
    """An axis as the op ``node`` couples it; ``made`` where that op makes the axis at the other end."""

    axis: Axis
    node: str
    made: bool


class Atlas:
    """A dependency graph, its groups, and what is quick to look up in them."""

    def __init__(self, graph: nx.Graph[Axis]) -> None:
        self.graph = graph
        self.axes: AxisMap = axis_map(graph)
        self.groups: tuple[Group, ...] = find_groups(graph)
        self.by_factor: dict[Factor, Group] = {g.factor: g for g in self.groups if g.factor is not None}
        self.weights: frozenset[str] = frozenset(self.axes.weights())

    @cached_property
    def holding(self) -> dict[Factor, list[Axis]]:
        """The axes that hold each factor."""
        found: dict[Factor, list[Axis]] = {}
        for axis in self.graph.nodes:
            for factor in self.factors(axis):
                found.setdefault(factor, []).append(axis)
        return found

    def factors(self, axis: Axis) -> list[Factor]:
        """The factors of ``axis``, each once."""
        return list(dict.fromkeys(factors(self.graph.nodes[axis]["expr"])))

    def in_order(self, axes: Iterable[Axis]) -> list[Axis]:
        """``axes`` in order of execution; of parallel ones, matrices before what is added to them."""
        order, tensors = self.axes.order, self.axes.tensors
        return sorted(
            axes,
            key=lambda a: (self.rank(a), order.get(a.tensor, 0), -len(tensors[a.tensor]), self._place[a.tensor], a.dim),
        )

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.axes.tensors)}

    def rank(self, axis: Axis) -> float:
        """How far along the computation ``axis`` is: the longest chain of ops to where it is first used.

        An axis that an op consumes comes half a step before one it produces, so that the input axis of a projection
        stands before its output axis. Axes of parallel branches have equal ranks.
        """
        return self._ranks.get(axis, 0.0)

    @cached_property
    def _ranks(self) -> dict[Axis, float]:
        uses = self._uses()
        level: dict[str, int] = {}
        for use in uses:
            source = _maker(use.axis.tensor)
            if use.axis.tensor not in self.weights and source != use.node:
                level[use.node] = max(level.get(use.node, 0), level.get(source, 0) + 1)
        found: dict[Axis, float] = {}
        for axis, node, made in uses:
            rank = level.get(node, 0) - (0.0 if made else 0.5)
            found[axis] = min(found.get(axis, rank), rank)
        return found

    def _uses(self) -> list[_Use]:
        """Both ends of every coupling in order of execution; where names are tied, nothing executes."""
        position = {node: i for i, node in enumerate(dict.fromkeys(map(_maker, self.axes.tensors)))}
        found: list[tuple[int, _Use]] = []
        for a, b, node in self.graph.edges(data="node"):
            if node not in position and self.weights.issuperset((a.tensor, b.tensor)):
                continue
            op = node if node in position else max(_maker(a.tensor), _maker(b.tensor), key=position.__getitem__)
            for end, other in ((a, b), (b, a)):
                found.append((position[op], _Use(end, op, op in (_maker(end.tensor), _maker(other.tensor)))))
        return [use for _, use in sorted(found, key=lambda item: item[0])]


def _maker(tensor: str) -> str:
    """The graph node that makes ``tensor``, which may be one of several outputs."""
    return tensor.partition("#")[0]
