"""The part of a dependency graph that a picture shows, and its labels.

A model of 32 layers has ten thousand axes, most of them of activations. A picture of parameters leaves the activations
out: two parameter axes that share a factor are joined by one edge, which stands for the shortest path between them. Of
all such edges a minimum spanning tree of each factor is drawn, so that *n* axes need *n - 1* edges.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import networkx as nx

from fxprune.axes import Factor, kept_size, render
from fxprune.discovery.explain import exactness
from fxprune.discovery.groups import Group
from fxprune.draw.atlas import Atlas, Fold, block_ranges
from fxprune.graph.facts import owner_block
from fxprune.rules.registry import moves_values
from fxprune.rules.statements import Axis

_Pair = tuple[Axis, Axis]
_Path = tuple[Axis, ...]


@dataclass(frozen=True)
class Edge:
    """A line of the picture, from the axis that executes first.

    Args:
        paths: for each factor that is coupled over the line, the axes on the path, ends included.
        ranks: whether the source is drawn above the target.
        in_tree: whether the search took this line; False for one that only closes a cycle.
    """

    source: Axis
    target: Axis
    paths: Mapping[Factor, tuple[Axis, ...]]
    ranks: bool = True
    in_tree: bool = True


@dataclass(frozen=True)
class View:
    """Contents of a picture.

    Args:
        axes: the axes shown, in order of execution.
        couplings: the lines between them.
        trigger: the axis where the search started, if it is shown.
        entering: axes of activations that are computed outside the picture.
        folds: all blocks of the model, equal ones together; empty if each is drawn by itself.
    """

    title: str
    axes: tuple[Axis, ...]
    couplings: tuple[Edge, ...]
    trigger: Axis | None = None
    entering: frozenset[Axis] = frozenset()
    folds: tuple[Fold, ...] = ()


def contracted(atlas: Atlas, title: str, shown: Iterable[Axis]) -> View:
    """A picture of the axes ``shown``, joined if they are coupled through axes that are not shown.

    For each factor the lines are a minimum spanning tree of the axes shown, by the length of the shortest path between
    them. Lines between parallel branches are avoided, and lines that other factors need are preferred.

    Complexity: ``O(m log m)`` for each factor, ``m`` couplings between axes that hold it.
    """
    axes = atlas.in_order(shown)
    number = {axis: i for i, axis in enumerate(axes)}
    ends: dict[Factor, list[Axis]] = {}
    for axis in axes:
        for factor in atlas.factors(axis):
            ends.setdefault(factor, []).append(axis)
    parts = {factor: atlas.part(factor) for factor in ends}
    paths = {factor: _neighbours(parts[factor], found) for factor, found in ends.items()}
    pairs = dict.fromkeys(
        pair for found in paths.values() for pair in sorted(found, key=lambda pair: (number[pair[0]], number[pair[1]]))
    )
    lines: dict[_Pair, dict[Factor, _Path]] = {}
    for factor, found in ends.items():
        known, inside = paths[factor], set(found)
        for pair in pairs if len(found) > 1 else ():
            if pair not in known and inside.issuperset(pair):
                with suppress(nx.NetworkXNoPath):
                    known[pair] = tuple(nx.shortest_path(parts[factor], *pair))
        for pair, path in _tree(atlas, {pair: known[pair] for pair in pairs if pair in known}).items():
            lines.setdefault(pair, {})[factor] = path
    place = {axis: (atlas.rank(axis), atlas.is_activation(axis)) for axis in axes}
    couplings = (Edge(a, b, found, ranks=place[a] < place[b]) for (a, b), found in lines.items())
    return View(title, tuple(axes), tuple(couplings))


def _neighbours(graph: nx.Graph[Axis], ends: Sequence[Axis]) -> dict[_Pair, _Path]:
    """Pairs of ``ends`` with the shortest path between them, enough pairs for a minimum spanning tree.

    ``graph`` has the axes that hold one factor, ``ends`` those that are shown, in order. No path passes a third end.

    Source: K. Mehlhorn, "A faster approximation algorithm for the Steiner problem in graphs", 1988, section 2.
    """
    number = {axis: i for i, axis in enumerate(ends)}
    nearest = nx.multi_source_dijkstra_path(graph, ends)
    best: dict[_Pair, _Path] = {}
    for a, b in graph.edges:
        if a not in nearest or number[nearest[a][0]] == number[nearest[b][0]]:
            continue
        path = (*nearest[a], *reversed(nearest[b]))
        path = path if number[path[0]] < number[path[-1]] else path[::-1]
        pair = path[0], path[-1]
        if pair not in best or len(path) < len(best[pair]):
            best[pair] = path
    return best


def _tree(atlas: Atlas, paths: Mapping[_Pair, _Path]) -> dict[_Pair, _Path]:
    """The paths of a minimum spanning tree.

    Paths of a stream, over activations alone and not through a tied embedding, have weight 0. Paths between parallel
    branches weigh more than all others, and paths between names of one tensor even more.
    """
    metric: nx.Graph[Axis] = nx.Graph()
    longest = max(map(len, paths.values()), default=0)
    for (a, b), path in paths.items():
        parallel = atlas.rank(a) == atlas.rank(b)
        stream = all(map(atlas.is_activation, path))
        tied = not any(map(atlas.is_activation, path))
        weight = 0 if stream else len(path) + parallel * longest + 2 * tied * longest
        metric.add_edge(a, b, weight=weight, pair=(a, b))
    pairs = (data["pair"] for _, _, data in nx.minimum_spanning_edges(metric, data=True))
    return {pair: paths[pair] for pair in pairs}


def searched(atlas: Atlas, title: str, group: Group, inside: Iterable[Axis]) -> View:
    """A picture of the axes that breadth-first search reaches from the trigger of a group.

    ``group`` is not one of a whole block; ``inside`` are the axes that may be shown.
    """
    assert group.factor is not None and group.trigger is not None
    factor, reach = group.factor, atlas.part(group.factor)
    before = dict(nx.bfs_predecessors(reach, group.trigger))
    wanted = {group.trigger, *before}.intersection(inside)
    couplings = []
    for axis in atlas.in_order(wanted):  # back to the last wanted axis that the search passed before
        path = [axis]
        while path[-1] in before and (len(path) == 1 or path[-1] not in wanted):
            path.append(before[path[-1]])
        if len(path) > 1 and path[-1] in wanted:
            couplings.append(Edge(path[-1], axis, {factor: tuple(reversed(path))}))
    taken = {(line.source, line.target) for line in couplings}
    for a, b in reach.edges:
        if a in wanted and b in wanted and (a, b) not in taken and (b, a) not in taken:
            couplings.append(Edge(a, b, {factor: (a, b)}, ranks=False, in_tree=False))
    trigger = group.trigger if group.trigger in wanted else None
    return View(title, tuple(atlas.in_order(wanted)), tuple(couplings), trigger)


_WIDTH = 26
"""Characters of a line in a box; two boxes of parallel branches then fit side by side."""
_LONG_OP = 16
"""Ops with longer names are shown by their initials, to keep the picture narrow."""
_OPS_SHOWN = 6
"""Of a longer chain only the first and last ops are shown; the tooltip lists all."""

REMOVAL = {"exact": "exact", "masked": "exact, norms as masked", "renormalised": "renormalised"}
"""Labels of a removal, by :func:`fxprune.discovery.explain.exactness`."""


class Labels:
    """Labels and tooltips of a picture; of ``folds`` (equal blocks) the first is shown."""

    def __init__(self, atlas: Atlas, folds: Sequence[Fold] = ()) -> None:
        self._atlas, self._folds = atlas, folds
        self._shared_heads = frozenset(g.outer for g in atlas.groups if g.kind == "head" and g.outer is not None)
        self._hidden = tuple(block for fold in folds for block in fold.hidden)
        self._axes = {axis: alike for fold in folds for axis, alike in fold.axes.items()}
        self._factors = {factor: alike for fold in folds for factor, alike in fold.factors.items()}

    def unit(self, factor: Factor) -> str:
        """Kind of a unit: that of its group, ``fixed`` if frozen, ``free`` if in no group."""
        group = self._atlas.by_factor.get(factor)
        if group is not None:
            return self.kind(group)
        return "fixed" if factor in self._atlas.axes.frozen else "free"

    def kind(self, group: Group) -> str:
        """Kind of a group; of nested heads, the outer are KV heads and the inner query heads."""
        if group.kind == "head" and group.factor in self._shared_heads:
            return "kv_head"
        return "query_head" if group.kind == "head" and group.outer in self._shared_heads else group.kind

    def expression(self, axis: Axis) -> str:
        """Expression of ``axis`` by kinds of units, as in ``(kv_head:2 * query_head:2 * [head_dim:8 | head_dim:8])``.

        A fold has its least and its largest size, as in ``mlp:1024..1480``; a plan, sizes before and after, as in
        ``mlp:1536→1184``.
        """
        expr = self._atlas.graph.nodes[axis]["expr"]
        return render(expr, lambda factor: f"{self.unit(factor)}:{self.amount(factor)}")

    def alike(self, factor: Factor) -> tuple[Factor, ...]:
        """The factors of all equal blocks that a factor of the first stands for."""
        return self._factors.get(factor, (factor,))

    def amount(self, factor: Factor) -> str:
        """Number of units of ``factor``, and the number that stay."""
        keep, alike = self._atlas.keep, self.alike(factor)
        before = _span(f.size for f in alike)
        groups = self._atlas.by_factor
        left = [f for f in alike if f not in groups or groups[f].block not in self._atlas.removed]
        after = before if keep is None else _span(map(keep.count, left)) if left else "0"
        return before if before == after else f"{before}→{after}"

    def share(self, axis: Axis) -> float:
        """Fraction of ``axis`` that the plan keeps; of a fold, the mean over the blocks that stay."""
        keep, nodes = self._atlas.keep, self._atlas.graph.nodes
        if keep is None:
            return 1.0
        alike = self._axes.get(axis, (axis,))
        left = [nodes[a] for a in alike if owner_block(self._atlas.module(a), self._atlas.removed) is None]
        return sum(kept_size(node["expr"], keep) / node["size"] for node in left) / len(left) if left else 0.0

    def label(self, axis: Axis) -> str:
        """Label of ``axis`` in two or three short lines."""
        tensor = axis.tensor
        if tensor in self._atlas.weights:
            tensor = ".".join(tensor.split(".")[-2:])
        lines = textwrap.wrap(self.expression(axis), _WIDTH, break_long_words=False, break_on_hyphens=False)
        share = self.share(axis)
        stays = [f"{share:.0%} stays"] if share < 1 else []
        return "\n".join((f"{tensor}[{axis.dim}]", *lines, *stays))

    def about(self, axis: Axis) -> str:
        """Tooltip of ``axis``: its tensor, expression, groups, frozen units and the plan."""
        data, atlas = self._atlas.graph.nodes[axis], self._atlas
        lines = [
            f"{data['role']} {axis.tensor}, axis {axis.dim}, {plural(data['size'], 'position')}",
            self.expression(axis),
        ]
        if atlas.is_sum(axis):
            lines.append("residual add: the stream plus the output of a branch")
        for factor in atlas.factors(axis):
            group, freeze = atlas.by_factor.get(factor), atlas.axes.frozen.get(factor)
            if group is not None:
                lines.append(f"group {group.name}: {plural(factor.size, 'unit')}, {self.removal(group)}")
            elif freeze is not None:
                lines.append(f"frozen, {plural(factor.size, 'unit')}: {freeze}")
        fold = next((fold for fold in self._folds if axis in fold.axes and fold.hidden), None)
        if fold is not None:
            lines.append(f"the same in {block_ranges(fold.blocks, atlas.axes.blocks)}")
        if atlas.keep is not None:
            lines.append(f"the plan leaves {self.share(axis):.1%} of it{' on average' if fold else ''}")
        return "\n".join(lines)

    def removal(self, group: Group) -> str:
        """Whether removing units of ``group`` equals masking them."""
        return REMOVAL[exactness(self._atlas.axes, group)]

    def op(self, name: str) -> str:
        """Short name of an op: ``linear`` for ``aten.linear.default``, initials for long names."""
        if name in self._atlas.weights:
            return "tied"
        parts = name.strip("<>").rpartition(" ")[2].split(".")
        short = parts[1] if len(parts) > 1 else parts[0]
        return "".join(word[0] for word in short.split("_") if word) if len(short) > _LONG_OP else short

    def ops(self, coupling: Edge) -> str:
        """Ops on the shortest path of ``coupling``, without repeats, moves of data and the middle of long chains.

        The add of a residual sum is left out too: the node of the sum shows it.
        """
        path = min(coupling.paths.values(), key=len)
        steps = self._steps(path)
        if self._atlas.is_sum(coupling.target) and steps[-1][1] == coupling.target.tensor:
            steps = steps[:-1]
        ops = [op for op, _ in steps]
        names = [self.op(op) for op in ops if not moves_values(op)] or [self.op(op) for op in ops]
        names = [name for name, _ in itertools.groupby(names)]
        inner = {owner_block(self._atlas.module(axis), self._hidden) for axis in path[1:]} - {None}
        if inner and self._atlas.is_activation(coupling.source):
            return textwrap.fill(f"through {plural(len(inner), 'more block')}", _WIDTH)
        if len(names) > _OPS_SHOWN:
            names = [*names[: _OPS_SHOWN // 2], "...", *names[-_OPS_SHOWN // 2 :]]
        return textwrap.fill(" · ".join(names), _WIDTH)

    def paths(self, coupling: Edge) -> str:
        """Tooltip of ``coupling``: the kinds of units on each path, then its ops, tensors and rules."""
        kinds: dict[tuple[Axis, ...], list[str]] = {}
        for factor, path in coupling.paths.items():
            kinds.setdefault(path, []).append(self.unit(factor))
        lines = []
        for path, names in kinds.items():
            lines.append(f"{', '.join(dict.fromkeys(names))}: from {path[0].tensor}[{path[0].dim}]")
            for (op, node), axis in zip(self._steps(path), path[1:], strict=True):
                lines.append(f"  {op} (at {node}) to {axis.tensor}[{axis.dim}]")
                if node in self._atlas.axes.rules:
                    # not the arrow of DOT, so that tooltips are not taken for edges
                    lines.append(f"    {self._atlas.axes.rules[node].replace('->', '→')}")
        return "\n".join(lines)

    def _steps(self, path: Sequence[Axis]) -> list[tuple[str, str]]:
        edges = (self._atlas.graph.edges[pair] for pair in itertools.pairwise(path))
        return [(edge["op"], edge["node"]) for edge in edges]


def plural(count: int, word: str, words: str = "") -> str:
    """Format a count with its noun; the plural ``words`` ends in s by default."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {words or word + 's'}"


def _span(sizes: Iterable[int]) -> str:
    """Format the range of sizes, as in ``8..12``."""
    found = set(sizes)
    return f"{min(found)}" if len(found) == 1 else f"{min(found)}..{max(found)}"
