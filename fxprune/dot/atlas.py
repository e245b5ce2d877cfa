"""A dependency graph with the indices that pictures of it need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property

import networkx as nx

from fxprune.axes import Factor, Keep, factors
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.discovery.groups import Group, find_groups
from fxprune.graph.names import maker_of
from fxprune.removal.plan import Plan, keep_of
from fxprune.rules.statements import Axis

__all__ = ["Atlas"]


class Atlas:
    """A dependency graph, its groups, and what is quick to look up in them.

    Args:
        graph: the dependency graph; ``Atlas.graph`` has the uses of tied weights at the names that their modules have.
        plan: what goes of the model; None where nothing is said of that.

    Raises:
        PlanError: the plan is of another model.
    """

    def __init__(self, graph: nx.Graph[Axis], plan: Plan | None = None) -> None:
        self.axes: AxisMap = axis_map(graph)
        self.graph = _with_own_uses(graph, self.axes)
        self.groups: tuple[Group, ...] = find_groups(graph)
        self.by_factor: dict[Factor, Group] = {g.factor: g for g in self.groups if g.factor is not None}
        self.weights: frozenset[str] = frozenset(self.axes.weights())
        self.keep: Keep | None = None if plan is None else keep_of(self.axes, self.groups, plan)
        self.removed: tuple[str, ...] = () if plan is None else plan.removed_blocks

    @cached_property
    def holding(self) -> dict[Factor, list[Axis]]:
        """The axes that hold each factor."""
        found: dict[Factor, list[Axis]] = {}
        for axis in self.graph.nodes:
            for factor in self.factors(axis):
                found.setdefault(factor, []).append(axis)
        return found

    def part(self, factor: Factor) -> nx.Graph[Axis]:
        """Return the axes that hold a factor with what couples them, in the order of the graph.

        A subgraph of networkx goes through a set, whose order, and with it which of two ways as short is shown, differs
        from process to process.
        """
        inside = dict.fromkeys(self.holding[factor])
        part: nx.Graph[Axis] = nx.Graph()
        part.add_nodes_from(inside)
        part.add_edges_from((a, b) for a in inside for b in self.graph.adj[a] if b in inside)
        return part

    @cached_property
    def shades(self) -> dict[Factor, int]:
        """For the factor of each group, which it is of the groups of its kind that its block has to do with.

        Those that span blocks come first.
        """
        found: dict[Factor, int] = {}
        taken: Counter[tuple[str | None, str]] = Counter()
        for group in sorted(self.groups, key=lambda group: group.block is not None):
            if group.factor is not None:
                found[group.factor] = taken[group.block, group.kind]
                if group.block is not None:
                    found[group.factor] += taken[None, group.kind]
                taken[group.block, group.kind] += 1
        return found

    def is_activation(self, axis: Axis) -> bool:
        """Return whether ``axis`` is of no parameter or buffer."""
        return axis.tensor not in self.weights

    def is_sum(self, axis: Axis) -> bool:
        """Return whether ``axis`` is one of the sum of a residual stream and what a branch adds to it."""
        return axis.tensor in self.axes.residuals

    @cached_property
    def sums(self) -> list[Axis]:
        """The axes of residual sums along which a parameter has units, in order of execution."""
        held = {factor for name in self.axes.parameters for expr in self.axes.tensors[name] for factor in factors(expr)}
        return [
            Axis(name, dim)
            for name in self.axes.residuals
            for dim, expr in enumerate(self.axes.tensors[name])
            if held.intersection(factors(expr))
        ]

    def module(self, axis: Axis) -> str:
        """Return the path of the module that ``axis`` belongs to."""
        return str(self.graph.nodes[axis]["module"]) or self.axes.modules.get(maker_of(axis.tensor), "")

    def factors(self, axis: Axis) -> list[Factor]:
        """Return the factors of ``axis``, each once."""
        return list(dict.fromkeys(factors(self.graph.nodes[axis]["expr"])))

    def in_order(self, axes: Iterable[Axis]) -> list[Axis]:
        """Return ``axes`` in order of execution; of parallel ones, matrices before what is added to them.

        Weights come before activations.
        """
        order, tensors = self.axes.order, self.axes.tensors
        place = {name: i for i, name in enumerate(tensors)}
        return sorted(
            axes,
            key=lambda a: (
                self.rank(a),
                self.is_activation(a),
                -len(tensors[a.tensor]),
                order.get(a.tensor, 0),
                place[a.tensor],
                a.dim,
            ),
        )

    def rank(self, axis: Axis) -> float:
        """Return how far along the computation ``axis`` is: the longest chain of ops to where it is first used.

        An axis that an op consumes comes half a step before one it produces, so that the input axis of a projection
        stands before its output axis. Axes of parallel branches have equal ranks. What is made of weights alone
        takes no step.
        """
        return self._ranks.get(axis, 0.0)

    @cached_property
    def _ranks(self) -> dict[Axis, float]:
        level: dict[str, int] = {}
        found: dict[Axis, float] = {}
        origins: dict[Axis, list[Axis]] = {}
        derived = set(self.axes.parameters)
        for op, edges in self._couplings().items():
            sources = {end.tensor for edge in edges for end in edge if maker_of(end.tensor) != op}
            if sources <= derived:
                derived.add(op)
                for a, b in edges:
                    own, source = (a, b) if maker_of(a.tensor) == op else (b, a)
                    origins.setdefault(own, []).extend(origins.get(source, [source]))
                continue
            level[op] = max(level.get(maker_of(tensor), 0) + 1 for tensor in sources - derived)
            for a, b in edges:
                rank = level[op] - (0.0 if op in (maker_of(a.tensor), maker_of(b.tensor)) else 0.5)
                for axis in (a, b, *origins.get(a, ()), *origins.get(b, ())):
                    found[axis] = min(found.get(axis, rank), rank)
        return found

    def _couplings(self) -> dict[str, list[tuple[Axis, Axis]]]:
        """Return the couplings of each op in order of execution; none of tied names, where nothing executes."""
        position = {node: i for i, node in enumerate(dict.fromkeys(map(maker_of, self.axes.tensors)))}
        found: dict[str, list[tuple[Axis, Axis]]] = {}
        for a, b, data in self.graph.edges(data=True):
            if data["node"] in position:
                found.setdefault(data["node"], []).append((a, b))
            elif not self.weights.issuperset((a.tensor, b.tensor)):
                later = max(maker_of(a.tensor), maker_of(b.tensor), key=position.__getitem__)
                found.setdefault(later, []).append((a, b))
        return dict(sorted(found.items(), key=lambda item: position[item[0]]))


def _with_own_uses(graph: nx.Graph[Axis], axes: AxisMap) -> nx.Graph[Axis]:
    """Return ``graph`` with each use of a tied weight at the name that the module using it has for the weight.

    A traced graph reads such a weight by one of its names alone.
    """
    names = {(owner, name.rpartition(".")[0]): name for name, owner in axes.tied.items()}
    names |= {(owner, owner.rpartition(".")[0]): owner for owner in axes.tied.values()}
    owners = axes.tied | {owner: owner for owner in axes.tied.values()}
    weights, told = set(axes.weights()), graph.copy()
    for a, b, data in graph.edges([axis for axis in graph if axis.tensor in owners], data=True):
        name = names.get((owners[a.tensor], axes.modules.get(data["node"], "")), a.tensor)
        if name != a.tensor and b.tensor not in weights:
            told.remove_edge(a, b)
            told.add_edge(Axis(name, a.dim), b, **data)
    return told
