"""Where a graph is cut into parts that run one after the other: where the fewest numbers are alive."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.rules.aliasing import alias_roots, writes, written_sources

__all__ = ["Part", "cut", "numbers"]


@dataclass(frozen=True, eq=False)
class Part:
    """Ops that run together.

    Args:
        nodes: in order of execution: ops, and before the first op of the part that needs it each weight.
        takes: values that ops before it, or the caller, made.
        gives: values that ops behind it use.
    """

    nodes: tuple[fx.Node, ...]
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the weights it reads."""
        return tuple(str(node.target) for node in self.nodes if node.op == "get_attr")


def cut(graph: fx.Graph, cost: Mapping[str, float], limit: float) -> list[Part]:
    """Return the parts of a graph, in order of execution.

    It is cut where the values alive are smallest, as they are where two blocks meet; a graph that writes to its weights
    or inputs is not cut at all.

    Args:
        graph: the graph.
        cost: of each weight, by name; 0 for others.
        limit: the cost of the weights in a part; one that is more than that has a part of its own.
    """
    ops = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
    if written_sources(graph):
        return [_part(ops)]
    reads = [{str(w.target) for w in op.all_input_nodes if w.op == "get_attr"} & cost.keys() for op in ops]
    alive, closed = _alive(ops), _closed(graph, ops)
    found, begin = [], 0
    while begin < len(ops):
        end = begin + _end([(reads[i], alive[i + 1], i + 1 in closed) for i in range(begin, len(ops))], cost, limit)
        found.append(_part(ops[begin:end]))
        begin = end
    return found


def _end(steps: Sequence[tuple[Collection[str], int, bool]], cost: Mapping[str, float], limit: float) -> int:
    """How many of the steps make up a part: in its second half by cost, until the fewest numbers are alive.

    Args:
        steps: of each op, the weights it reads, how many numbers are alive behind it, and whether no cut may be there.
        cost: of each weight.
        limit: of the cost of a part.
    """
    read, reach = set[str](), dict[int, float]()
    for count, (names, _, closed) in enumerate(steps, start=1):
        read.update(names)
        spent = sum(cost[name] for name in read)
        if spent > limit and reach:
            break
        if not closed:
            reach[count] = spent
    else:
        if spent <= limit:
            return len(steps)
    half = max(reach.values()) / 2
    return min((count for count in reach if reach[count] >= half), key=lambda count: (steps[count - 1][1], -count))


def _alive(ops: Sequence[fx.Node]) -> list[int]:
    """How many numbers are alive before each op, and after the last."""
    place = {op: i for i, op in enumerate(ops)}
    change = [0] * (len(ops) + 2)
    for op, i in place.items():
        last = max((place[user] for user in op.users), default=i)
        change[i + 1] += numbers(op)
        change[last + 1] -= numbers(op)
    found, now = [], 0
    for step in change[: len(ops) + 1]:
        now += step
        found.append(now)
    return found


def numbers(node: fx.Node) -> int:
    """Return how many numbers a node gives, at the sizes that the graph was traced with."""
    leaves = (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
    return sum(math.prod(size_hint(size) for size in leaf.shape) for leaf in leaves)


def _closed(graph: fx.Graph, ops: Sequence[fx.Node]) -> set[int]:
    """Where no cut may be: between an op that writes to a value and what has to do with the same memory."""
    root, place = alias_roots(graph), {op: i for i, op in enumerate(ops)}
    written = {root[value] for op in ops if writes(op) for value in op.all_input_nodes}
    span: dict[fx.Node, list[int]] = {}
    for op, i in place.items():
        for value in (op, *op.all_input_nodes):
            if root[value] in written:
                span.setdefault(root[value], []).append(i)
    return {position for places in span.values() for position in range(min(places) + 1, max(places) + 1)}


def _part(ops: Sequence[fx.Node]) -> Part:
    inside = set(ops)
    nodes, takes = dict[fx.Node, None](), dict[fx.Node, None]()
    for op in ops:
        for value in op.all_input_nodes:
            if value.op == "get_attr":
                nodes[value] = None
            elif value not in inside:
                takes[value] = None
        nodes[op] = None
    gives = tuple(op for op in ops if any(user not in inside for user in op.users))
    return Part(tuple(nodes), tuple(takes), gives)
