"""What a picture shows: axes, and the couplings between them, with everything else contracted.

A model of 32 layers has ten thousand axes, nearly all of them of activations. A picture of parameters leaves the
activations out: two parameter axes that share a factor are joined by one edge, which stands for the shortest way
between them. Of all such edges a minimum spanning tree for each factor is drawn, so *n* axes take *n - 1* edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx

from fxprune.axes import Factor
from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.fold import Fold
from fxprune.rules.statements import Axis

__all__ = ["Coupling", "View", "contracted", "searched"]

_Pair = tuple[Axis, Axis]
_Way = tuple[Axis, ...]


@dataclass(frozen=True)
class Coupling:
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
    couplings: tuple[Coupling, ...]
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
    couplings = (Coupling(a, b, found, ranks=place[a] < place[b]) for (a, b), found in lines.items())
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
    couplings = [Coupling(way[0], way[-1], {factor: way}) for way in ways]
    settled = {(way[0], way[-1]) for way in ways}
    for a, b in reach.edges:
        if a in wanted and b in wanted and (a, b) not in settled and (b, a) not in settled:
            couplings.append(Coupling(a, b, {factor: (a, b)}, ranks=False, settled=False))
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
