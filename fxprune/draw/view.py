"""The part of a dependency graph that a picture shows, and its labels.

A model of 32 layers has ten thousand axes, nearly all of them of activations. A picture of parameters leaves the
activations out: two parameter axes that share a factor are joined by one edge, which stands for the shortest way
between them. Of all such edges a minimum spanning tree for each factor is drawn, so *n* axes take *n - 1* edges.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from fxprune.axes import Factor, kept_size, render
from fxprune.discovery.explain import exactness
from fxprune.discovery.groups import Group
from fxprune.draw.atlas import Atlas, Fold, numbered
from fxprune.graph.facts import owner_block
from fxprune.rules.registry import moves_values
from fxprune.rules.statements import Axis

__all__ = ["REMOVAL", "Edge", "View", "Words", "contracted", "plural", "searched"]

_Pair = tuple[Axis, Axis]
_Way = tuple[Axis, ...]


@dataclass(frozen=True)
class Edge:
    """A line of the picture.

    Args:
        source: where it starts; what executes first.
        target: where it ends.
        ways: for each factor that both share over it, the axes on the way, ends included.
        ranks: whether the source belongs above the target.
        settled: whether the search took this line; False for one that only closes a circle.
    """

    source: Axis
    target: Axis
    ways: Mapping[Factor, tuple[Axis, ...]]
    ranks: bool = True
    settled: bool = True


@dataclass(frozen=True)
class View:
    """A picture before it is drawn.

    Args:
        title: what it shows, in words.
        axes: the axes shown, in order of execution.
        couplings: the lines between them.
        trigger: the axis where the search started, if one is shown.
        entering: activations that stand for what is computed before.
        folds: the blocks of the model, those that are the same together; empty where each is shown by itself.
    """

    title: str
    axes: tuple[Axis, ...]
    couplings: tuple[Edge, ...]
    trigger: Axis | None = None
    entering: frozenset[Axis] = frozenset()
    folds: tuple[Fold, ...] = ()


def contracted(atlas: Atlas, title: str, shown: Iterable[Axis]) -> View:
    """Return a picture of the axes ``shown``, joined where they are coupled through axes that are not.

    For each factor the lines are a minimum spanning tree of the axes shown under the length of the shortest way
    between them. Lines between parallel branches are avoided, and lines that other factors need too preferred.

    Complexity: ``O(m log m)`` for each factor, ``m`` couplings between axes that hold it.
    """
    axes = atlas.in_order(shown)
    number = {axis: i for i, axis in enumerate(axes)}
    webs: dict[Factor, _Web] = {}
    for axis in axes:
        for factor in atlas.factors(axis):
            if factor not in webs:
                webs[factor] = _Web(atlas.part(factor), [])
            webs[factor].ends.append(axis)
    ways = {factor: web.neighbours() for factor, web in webs.items()}
    pairs = dict.fromkeys(pair for found in ways.values() for pair in sorted(found, key=_by(number)))
    lines: dict[_Pair, dict[Factor, _Way]] = {}
    for factor, web in webs.items():
        ends = set(web.ends)
        known = {p: ways[factor].get(p) or web.way(p) for p in pairs if ends.issuperset(p)} if len(ends) > 1 else {}
        for pair, way in _tree(atlas, {p: w for p, w in known.items() if w}).items():
            lines.setdefault(pair, {})[factor] = way
    place = {axis: (atlas.rank(axis), atlas.is_activation(axis)) for axis in axes}
    couplings = (Edge(a, b, found, ranks=place[a] < place[b]) for (a, b), found in lines.items())
    return View(title, tuple(axes), tuple(couplings))


def _by(number: Mapping[Axis, int]) -> Callable[[_Pair], tuple[int, int]]:
    return lambda pair: (number[pair[0]], number[pair[1]])


@dataclass(frozen=True)
class _Web:
    """The axes that hold one factor, as coupled by ops, and those of them that are shown, in order of execution."""

    graph: nx.Graph[Axis]
    ends: list[Axis]

    def neighbours(self) -> dict[_Pair, _Way]:
        """Return pairs of ends with the shortest way between them, enough of them for a minimum spanning tree.

        No way passes an end that is not its own.

        Source: K. Mehlhorn, "A faster approximation algorithm for the Steiner problem in graphs", 1988, section 2.
        """
        number = {axis: i for i, axis in enumerate(self.ends)}
        nearest = nx.multi_source_dijkstra_path(self.graph, self.ends)
        best: dict[_Pair, _Way] = {}
        for a, b in self.graph.edges:
            if a not in nearest or number[nearest[a][0]] == number[nearest[b][0]]:
                continue
            way = (*nearest[a], *reversed(nearest[b]))
            way = way if number[way[0]] < number[way[-1]] else way[::-1]
            pair = way[0], way[-1]
            if pair not in best or len(way) < len(best[pair]):
                best[pair] = way
        return best

    def way(self, pair: _Pair) -> _Way:
        """Return the shortest way between two ends; empty if there is none."""
        try:
            return tuple(nx.shortest_path(self.graph, *pair))
        except nx.NetworkXNoPath:
            return ()


def _tree(atlas: Atlas, ways: Mapping[_Pair, _Way]) -> dict[_Pair, _Way]:
    """Return the ways of a minimum spanning tree.

    Those of a stream, from one activation to the next, come first. Those between parallel branches count as longer than
    all others, and those between names of one tensor as longer still.
    """
    metric: nx.Graph[Axis] = nx.Graph()
    longest = max(map(len, ways.values()), default=0)
    for (a, b), way in ways.items():
        parallel = atlas.rank(a) == atlas.rank(b)
        stream = atlas.is_activation(a) and atlas.is_activation(b)
        tied = not any(map(atlas.is_activation, way))
        weight = 0 if stream else len(way) + parallel * longest + 2 * tied * longest
        metric.add_edge(a, b, weight=weight, pair=(a, b))
    pairs = (data["pair"] for _, _, data in nx.minimum_spanning_edges(metric, data=True))
    return {pair: ways[pair] for pair in pairs}


def searched(atlas: Atlas, title: str, group: Group, inside: Iterable[Axis] | None = None) -> View:
    """Return a picture of what breadth-first search reaches from the trigger of ``group``, activations included.

    Args:
        atlas: the graph.
        title: of the picture.
        group: what to show; not a whole block.
        inside: the axes that may be shown; None for all.
    """
    assert group.factor is not None and group.trigger is not None
    factor, reach = group.factor, atlas.part(group.factor)
    tree = list(nx.bfs_edges(reach, group.trigger))
    reached = {group.trigger, *itertools.chain.from_iterable(tree)}
    wanted = reached if inside is None else reached.intersection(inside)
    before = {b: a for a, b in tree}
    ways = [way for axis in atlas.in_order(wanted) if (way := _way_back(axis, before, wanted))]
    couplings = [Edge(way[0], way[-1], {factor: way}) for way in ways]
    settled = {(way[0], way[-1]) for way in ways}
    for a, b in reach.edges:
        if a in wanted and b in wanted and (a, b) not in settled and (b, a) not in settled:
            couplings.append(Edge(a, b, {factor: (a, b)}, ranks=False, settled=False))
    trigger = group.trigger if group.trigger in wanted else None
    return View(title, tuple(atlas.in_order(wanted)), tuple(couplings), trigger)


def _way_back(axis: Axis, before: Mapping[Axis, Axis], wanted: Collection[Axis]) -> _Way:
    """Return the way that the search took to ``axis`` from the last wanted axis before it; empty if there is none."""
    way = [axis]
    while way[-1] in before:
        way.append(before[way[-1]])
        if way[-1] in wanted:
            return tuple(reversed(way))
    return ()


_WIDTH = 26
"""Characters of a line in a box: two boxes then fit side by side where a layer has parallel branches."""
_LONG_OP = 16
"""Longer names of ops are told by their initials, or one of them would set the width of the picture."""
_OPS_SHOWN = 6
"""Of a longer chain the first and last ops are shown; the tooltip has them all."""

REMOVAL = {"exact": "exact", "masked": "exact, norms as masked", "renormalised": "renormalised"}
"""What a picture says of a removal, by :func:`fxprune.discovery.explain.exactness`."""


class Words:
    """Says in words what an atlas holds.

    Args:
        atlas: the graph.
        folds: sets of blocks of which one is shown.
    """

    def __init__(self, atlas: Atlas, folds: Sequence[Fold] = ()) -> None:
        self._atlas, self._folds = atlas, folds
        self._shared_heads = frozenset(g.outer for g in atlas.groups if g.kind == "head" and g.outer is not None)
        self._hidden = tuple(block for fold in folds for block in fold.hidden)
        self._axes = {axis: alike for fold in folds for axis, alike in fold.axes.items()}
        self._factors = {factor: alike for fold in folds for factor, alike in fold.factors.items()}

    def unit(self, factor: Factor) -> str:
        """What a unit of ``factor`` is: the kind of its group, ``fixed`` if frozen, ``free`` if in no group."""
        group = self._atlas.by_factor.get(factor)
        if group is not None:
            return self.kind(group)
        return "fixed" if factor in self._atlas.axes.frozen else "free"

    def kind(self, group: Group) -> str:
        """The kind of ``group``; of heads in heads, the outer are KV heads and the inner query heads."""
        if group.kind == "head" and group.factor in self._shared_heads:
            return "kv_head"
        return "query_head" if group.kind == "head" and group.outer in self._shared_heads else group.kind

    def expression(self, axis: Axis) -> str:
        """What ``axis`` is made of, as in ``(kv_head:2 * query_head:2 * [head_dim:8 | head_dim:8])``.

        Of blocks drawn as one it has the least and the largest size, as in ``mlp:1024..1480``; with a plan what was and
        what stays, as in ``mlp:1536→1184``.
        """
        return render(self._atlas.graph.nodes[axis]["expr"], self.unit, self.amount)

    def amount(self, factor: Factor) -> str:
        """How many units ``factor`` has, and how many stay."""
        keep, alike = self._atlas.keep, self._factors.get(factor, (factor,))
        before = _span(f.size for f in alike)
        left = [f for f in alike if not self._goes(f)]
        after = before if keep is None else _span(map(keep.count, left)) if left else "0"
        return before if before == after else f"{before}→{after}"

    def share(self, axis: Axis) -> float:
        """Return how much of ``axis`` a plan leaves, from 0 to 1; of blocks drawn as one, on average of those left."""
        keep, nodes = self._atlas.keep, self._atlas.graph.nodes
        if keep is None:
            return 1.0
        left = [nodes[a] for a in self._axes.get(axis, (axis,)) if not self._is_removed(a)]
        return sum(kept_size(node["expr"], keep) / node["size"] for node in left) / len(left) if left else 0.0

    def label(self, axis: Axis) -> str:
        """``axis`` in two or three short lines."""
        tensor = axis.tensor
        if tensor in self._atlas.weights:
            tensor = ".".join(tensor.split(".")[-2:])
        lines = textwrap.wrap(self.expression(axis), _WIDTH, break_long_words=False, break_on_hyphens=False)
        share = self.share(axis)
        stays = [f"{share:.0%} stays"] if share < 1 else []
        return "\n".join((f"{tensor}[{axis.dim}]", *lines, *stays))

    def about(self, axis: Axis) -> str:
        """Everything about ``axis``."""
        data, atlas = self._atlas.graph.nodes[axis], self._atlas
        lines = [
            f"{data['role']} {axis.tensor}, axis {axis.dim}, {plural(data['size'], 'position')}",
            self.expression(axis),
        ]
        if atlas.is_sum(axis):
            lines.append("residual add: the stream and what a branch computed from it")
        for factor in atlas.factors(axis):
            group, freeze = atlas.by_factor.get(factor), atlas.axes.frozen.get(factor)
            if group is not None:
                lines.append(f"group {group.name}: {plural(factor.size, 'unit')}, {self.removal(group)}")
            elif freeze is not None:
                lines.append(f"frozen, {plural(factor.size, 'unit')}: {freeze}")
        fold = next((fold for fold in self._folds if axis in fold.axes and fold.hidden), None)
        if fold is not None:
            lines.append(f"the same in {numbered(fold.blocks, atlas.axes.blocks)}")
        if atlas.keep is not None:
            lines.append(f"the plan leaves {self.share(axis):.1%} of it{' on average' if fold else ''}")
        return "\n".join(lines)

    def removal(self, group: Group) -> str:
        """Whether removal of units of ``group`` equals masking them."""
        return REMOVAL[exactness(self._atlas.axes, group)]

    def op(self, name: str) -> str:
        """The op ``name`` in short: ``linear`` for ``aten.linear.default``, initials for long names."""
        if name in self._atlas.weights:
            return "tied"
        parts = name.strip("<>").rpartition(" ")[2].split(".")
        short = parts[1] if len(parts) > 1 else parts[0]
        return "".join(word[0] for word in short.split("_") if word) if len(short) > _LONG_OP else short

    def ops(self, coupling: Edge) -> str:
        """The ops on the shortest way of ``coupling``; repeats, moves of data and the middle of long ones left out.

        The add that makes a residual sum is left out too, as its sign says it.
        """
        way = min(coupling.ways.values(), key=len)
        steps = self._steps(way)
        if self._atlas.is_sum(coupling.target) and steps[-1][1] == coupling.target.tensor:
            steps = steps[:-1]
        ops = [op for op, _ in steps]
        names = [self.op(op) for op in ops if not moves_values(op)] or [self.op(op) for op in ops]
        names = [name for name, _ in itertools.groupby(names)]
        inner = {owner_block(self._atlas.module(axis), self._hidden) for axis in way[1:]} - {None}
        if inner and self._atlas.is_activation(coupling.source):
            return textwrap.fill(f"through {plural(len(inner), 'more block')}", _WIDTH)
        if len(names) > _OPS_SHOWN:
            names = [*names[: _OPS_SHOWN // 2], "...", *names[-_OPS_SHOWN // 2 :]]
        return textwrap.fill(" · ".join(names), _WIDTH)

    def way(self, coupling: Edge) -> str:
        """Every op and tensor on the ways of ``coupling``, and what is coupled over each."""
        units: dict[tuple[Axis, ...], list[str]] = {}
        for factor, way in coupling.ways.items():
            units.setdefault(way, []).append(self.unit(factor))
        return "\n".join(line for way, names in units.items() for line in self._told(way, names))

    def _told(self, way: tuple[Axis, ...], names: list[str]) -> list[str]:
        lines = [f"{', '.join(dict.fromkeys(names))}: from {way[0].tensor}[{way[0].dim}]"]
        for (op, node), axis in zip(self._steps(way), way[1:], strict=True):
            lines.append(f"  {op} (at {node}) to {axis.tensor}[{axis.dim}]")
            if node in self._atlas.axes.rules:
                # another arrow than that of the language, so that lines of a file can be told from tooltips
                lines.append(f"    {self._atlas.axes.rules[node].replace('->', '→')}")
        return lines

    def _steps(self, way: Sequence[Axis]) -> list[tuple[str, str]]:
        edges = (self._atlas.graph.edges[pair] for pair in itertools.pairwise(way))
        return [(edge["op"], edge["node"]) for edge in edges]

    def _goes(self, factor: Factor) -> bool:
        """Whether a block goes that all units of ``factor`` are in."""
        group = self._atlas.by_factor.get(factor)
        return group is not None and group.block in self._atlas.removed

    def _is_removed(self, axis: Axis) -> bool:
        return owner_block(self._atlas.module(axis), self._atlas.removed) is not None


def plural(count: int, word: str, words: str = "") -> str:
    """``count`` and ``word``, or ``words`` where there are several (by default with an s)."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {words or word + 's'}"


def _span(sizes: Iterable[int]) -> str:
    """One size, or the least and the largest."""
    found = set(sizes)
    return f"{min(found)}" if len(found) == 1 else f"{min(found)}..{max(found)}"
