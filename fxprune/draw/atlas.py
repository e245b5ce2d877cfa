"""A dependency graph indexed for drawing, with equal blocks folded.

Two blocks are equal if their parts of the dependency graph are: the same axes made of the same kinds of units, with the
same couplings by the same ops. Sizes may differ, as they do in a slim model. Names are compared relative to the block:
weights by their path in it, activations by their position, and the input from the block before as one symbol.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from fxprune.axes import Factor, Keep, factors, render
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.discovery.groups import Group, axes_by_factor, find_groups
from fxprune.graph.tensors import producer_of
from fxprune.removal.plan import Plan, keep_of
from fxprune.rules.statements import Axis


class Atlas:
    """A dependency graph and its groups, indexed, with the plan to show, if any.

    In ``Atlas.graph`` each use of a tied weight is coupled to the name that the module using it has for the weight.

    Raises:
        PlanError: the plan is for another model.
    """

    def __init__(self, graph: nx.Graph[Axis], plan: Plan | None = None) -> None:
        self.axes: AxisMap = axis_map(graph)
        self.graph = _with_names_of_uses(graph, self.axes)
        self.groups: tuple[Group, ...] = find_groups(graph)
        self.by_factor: dict[Factor, Group] = {g.factor: g for g in self.groups if g.factor is not None}
        self.weights: frozenset[str] = frozenset(self.axes.weights())
        self.keep: Keep | None = None if plan is None else keep_of(self.axes, self.groups, plan)
        self.removed: tuple[str, ...] = () if plan is None else plan.removed_blocks

    @cached_property
    def holding(self) -> dict[Factor, list[Axis]]:
        return axes_by_factor(self.graph)

    def part(self, factor: Factor) -> nx.Graph[Axis]:
        """The axes that hold a factor and their couplings, in the order of the graph."""
        # nx.Graph.subgraph iterates over a set: which of two equally short paths is shown would differ by process
        inside = dict.fromkeys(self.holding[factor])
        part: nx.Graph[Axis] = nx.Graph()
        part.add_nodes_from(inside)
        part.add_edges_from((a, b) for a in inside for b in self.graph.adj[a] if b in inside)
        return part

    @cached_property
    def shades(self) -> dict[Factor, int]:
        """Number of each group among those of its kind in its block, by factor; groups that span blocks come first."""
        found: dict[Factor, int] = {}
        taken: Counter[tuple[str | None, str]] = Counter()
        for group in sorted(self.groups, key=lambda group: group.block is not None):
            if group.factor is not None:
                found[group.factor] = sum(taken[block, group.kind] for block in {None, group.block})
                taken[group.block, group.kind] += 1
        return found

    def is_activation(self, axis: Axis) -> bool:
        return axis.tensor not in self.weights

    def is_sum(self, axis: Axis) -> bool:
        """Whether ``axis`` belongs to a residual sum: a stream plus the output of a branch."""
        return axis.tensor in self.axes.residuals

    @cached_property
    def sums(self) -> list[Axis]:
        """Axes of residual sums that share a factor with a parameter, in order of execution."""
        held = {factor for name in self.axes.parameters for expr in self.axes.tensors[name] for factor in factors(expr)}
        return [
            Axis(name, dim)
            for name in self.axes.residuals
            for dim, expr in enumerate(self.axes.tensors[name])
            if held.intersection(factors(expr))
        ]

    def module(self, axis: Axis) -> str:
        return str(self.graph.nodes[axis]["module"]) or self.axes.modules.get(producer_of(axis.tensor), "")

    def factors(self, axis: Axis) -> list[Factor]:
        return list(dict.fromkeys(factors(self.graph.nodes[axis]["expr"])))

    def in_order(self, axes: Iterable[Axis]) -> list[Axis]:
        """Return ``axes`` in order of execution: weights before activations, and matrices before biases."""
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
        """The depth of ``axis`` in the computation: the longest chain of ops to its first use.

        An axis that an op consumes comes half a step before one that it produces, so that the input axis of a
        projection stands above its output axis. Axes of parallel branches have equal ranks. Ops on weights alone
        take no step.
        """
        return self._ranks.get(axis, 0.0)

    @cached_property
    def _ranks(self) -> dict[Axis, float]:
        level: dict[str, int] = {}
        found: dict[Axis, float] = {}
        origins: dict[Axis, list[Axis]] = {}
        derived = set(self.axes.parameters)
        for op, edges in self._couplings().items():
            sources = {end.tensor for edge in edges for end in edge if producer_of(end.tensor) != op}
            if sources <= derived:
                derived.add(op)
                for a, b in edges:
                    own, source = (a, b) if producer_of(a.tensor) == op else (b, a)
                    origins.setdefault(own, []).extend(origins.get(source, [source]))
                continue
            level[op] = max(level.get(producer_of(tensor), 0) + 1 for tensor in sources - derived)
            for a, b in edges:
                rank = level[op] - (0.0 if op in (producer_of(a.tensor), producer_of(b.tensor)) else 0.5)
                for axis in (a, b, *origins.get(a, ()), *origins.get(b, ())):
                    found[axis] = min(found.get(axis, rank), rank)
        return found

    def _couplings(self) -> dict[str, list[tuple[Axis, Axis]]]:
        """The couplings of each op in order of execution, without those between names of a tied weight."""
        position = {node: i for i, node in enumerate(dict.fromkeys(map(producer_of, self.axes.tensors)))}
        found: dict[str, list[tuple[Axis, Axis]]] = {}
        for a, b, data in self.graph.edges(data=True):
            if data["node"] in position:
                found.setdefault(data["node"], []).append((a, b))
            elif not self.weights.issuperset((a.tensor, b.tensor)):
                later = max(producer_of(a.tensor), producer_of(b.tensor), key=position.__getitem__)
                found.setdefault(later, []).append((a, b))
        return dict(sorted(found.items(), key=lambda item: position[item[0]]))


def _with_names_of_uses(graph: nx.Graph[Axis], axes: AxisMap) -> nx.Graph[Axis]:
    """Return ``graph`` with each use of a tied weight coupled to the name that the module using it has for the weight.

    A traced graph reads such a weight by a single name.
    """
    names = {(owner, name.rpartition(".")[0]): name for name, owner in axes.tied.items()}
    names |= {(owner, owner.rpartition(".")[0]): owner for owner in axes.tied.values()}
    owners = axes.tied | {owner: owner for owner in axes.tied.values()}
    weights, renamed = set(axes.weights()), graph.copy()
    for a, b, data in graph.edges([axis for axis in graph if axis.tensor in owners], data=True):
        name = names.get((owners[a.tensor], axes.modules.get(data["node"], "")), a.tensor)
        if name != a.tensor and b.tensor not in weights:
            renamed.remove_edge(a, b)
            renamed.add_edge(Axis(name, a.dim), b, **data)
    return renamed


_STREAM = "input from the block before"


@dataclass(frozen=True)
class Fold:
    """Equal blocks, of which the first is drawn.

    Args:
        axes: for each axis of the first block, the corresponding axes of all blocks, in order.
        factors: for each factor of these axes, the corresponding factors of all blocks, in order.
    """

    blocks: tuple[str, ...]
    axes: Mapping[Axis, tuple[Axis, ...]]
    factors: Mapping[Factor, tuple[Factor, ...]]

    @property
    def hidden(self) -> tuple[str, ...]:
        return self.blocks[1:]


def find_folds(atlas: Atlas) -> tuple[Fold, ...]:
    """All blocks of the model, equal ones together, in order of the first of each.

    Complexity: linear in the size of the graph.
    """
    forms = _Forms(atlas)
    alike: dict[object, list[str]] = {}
    for block in atlas.axes.blocks:
        alike.setdefault(forms.form(block), []).append(block)
    return tuple(forms.fold(blocks) for blocks in alike.values())


class _Forms:
    """Forms of blocks: their parts of the graph without names and sizes."""

    def __init__(self, atlas: Atlas) -> None:
        """Index the axes and couplings of each block, in order, and the blocks that read each tensor from outside.

        Names of tensors are relative to the block.
        """
        self.atlas, axes = atlas, atlas.axes
        self.inside: dict[str, dict[Axis, str]] = {block: {} for block in axes.blocks}
        self.edges: dict[str, list[tuple[Axis, Axis, str]]] = {block: [] for block in axes.blocks}
        self.readers: dict[str, set[str]] = {}
        places: dict[str, dict[str, int]] = {block: {} for block in axes.blocks}
        for axis in atlas.graph.nodes:
            block = axes.block_of(atlas.module(axis))
            if block is None:
                continue
            name = axis.tensor[len(block) + 1 :]
            if axis.tensor not in atlas.weights:
                name = f"#{places[block].setdefault(axis.tensor, len(places[block]))}"
            self.inside[block][axis] = name
        for a, b, data in atlas.graph.edges(data=True):
            block = axes.block_of(axes.modules.get(data["node"], ""))
            if block is not None:
                self.edges[block].append((a, b, data["op"]))
                for axis in {a, b} - self.inside[block].keys():
                    self.readers.setdefault(axis.tensor, set()).add(block)

    def form(self, block: str) -> object:
        """The form of a block; equal blocks have equal forms."""
        names, numbers = self.inside[block], dict[Factor, int]()

        def kind(factor: Factor) -> str:
            group, freeze = self.atlas.by_factor.get(factor), self.atlas.axes.frozen.get(factor)
            if group is not None and group.block != block:
                return group.name
            own = numbers.setdefault(factor, len(numbers))
            return f"{freeze.reason} {own}" if freeze is not None else f"{group.kind if group else 'free'} {own}"

        def end(axis: Axis) -> tuple[str, int]:
            if axis in names:
                return names[axis], axis.dim
            shared = axis.tensor in self.atlas.weights or len(self.readers[axis.tensor]) > 1
            return axis.tensor if shared else _STREAM, axis.dim

        nodes = self.atlas.graph.nodes
        axes = tuple((name, axis.dim, render(nodes[axis]["expr"], kind)) for axis, name in names.items())
        lines = sorted((*sorted((end(a), end(b))), op) for a, b, op in self.edges[block])
        return axes, tuple(lines), block in self.atlas.axes.bypasses

    def fold(self, blocks: Sequence[str]) -> Fold:
        axes = {column[0]: column for column in zip(*(self.inside[block] for block in blocks), strict=True)}
        factors: dict[Factor, tuple[Factor, ...]] = {}
        for column in axes.values():
            for row in zip(*(self.atlas.factors(axis) for axis in column), strict=True):
                factors.setdefault(row[0], row)
        return Fold(tuple(blocks), axes, factors)


def block_ranges(blocks: Iterable[str], among: Sequence[str]) -> str:
    """Format module paths of blocks, some ``among`` all of a model, as ranges: ``model.layers.0 to 4, 6 to 10``."""
    runs: list[list[str]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last and among.index(last) + 1 == among.index(block) and _parent(last) == _parent(block):
            runs[-1].append(block)
        else:
            runs.append([block])
    ranges: list[str] = []
    before = ""
    for run in runs:
        first = run[0] if _parent(run[0]) != before else run[0].rpartition(".")[2]
        ranges.append(first if len(run) == 1 else f"{first} to {run[-1].rpartition('.')[2]}")
        before = _parent(run[0])
    return ", ".join(ranges)


def _parent(block: str) -> str:
    return block.rpartition(".")[0] if re.search(r"\.\d+$", block) else block
