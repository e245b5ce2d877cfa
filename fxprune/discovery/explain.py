"""Why an axis is in a group, and why one is in none."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxprune.axes import Freeze, contains, factors
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.discovery.groups import Group, axes_by_factor, find_groups
from fxprune.discovery.lookup import find_axis
from fxprune.errors import FxpruneError
from fxprune.pipeline.arguments import instance, refuse
from fxprune.rules.statements import Axis

__all__ = ["Step", "exactness", "explain", "frozen_axes", "frozen_in", "groups_of", "unruled"]


@dataclass(frozen=True)
class Step:
    """One coupling on the way from a trigger to a member.

    Args:
        source: an axis.
        target: the axis that an op couples with it.
        op: the op.
        node: name of its node.
        rule: the rule of the op, by itself, as text; empty where two names of one tensor are coupled.
    """

    source: Axis
    target: Axis
    op: str
    node: str
    rule: str = ""


def explain(graph: nx.Graph[Axis], member: Axis | tuple[str, int], group: Group | None = None) -> list[Step]:
    """The shortest chain of ops that ties ``member`` to the trigger of its group.

    Args:
        graph: the dependency graph.
        member: tensor name and axis; of the name so much as tells it from others, as in ``("layers.3.mixer.proj", 0)``.
        group: the group meant, where the axis is in several; None for the first.

    Raises:
        ArgumentError: an argument is of the wrong type, several tensors are called so, or there is no such axis.
        UnknownNameError: no such tensor; suggests the nearest.
        FxpruneError: the axis is in no group; says why it is frozen if it is.
    """
    axes = axis_map(graph)
    asked: Any = member
    if not isinstance(asked, tuple) or [type(part) for part in member] != [str, int]:
        raise refuse("member", member, "the name of a tensor and the number of its axis, as in ('embed.weight', 0)")
    if group is not None:
        instance("group", group, Group, "one of fxprune.find_groups(graph), or None")
    target = find_axis(graph, *member)
    expr = graph.nodes[target]["expr"]
    chosen = group or next(iter(groups_of(graph, target)), None)
    if chosen is None or chosen.factor is None or chosen.trigger is None or not contains(expr, chosen.factor):
        reason = next((str(axes.frozen[f]) for f in factors(expr) if f in axes.frozen), "it holds no removable unit")
        raise FxpruneError(
            f"axis {target.dim} is in no such group: {reason}",
            where=target.tensor,
            remedy="Ask for an axis of one of fxprune.find_groups(graph), and of this graph",
        )
    inside = graph.subgraph(axes_by_factor(graph)[chosen.factor])
    path = nx.shortest_path(inside, chosen.trigger, target)
    edges = itertools.pairwise(path)
    return [_step(graph, a, b) for a, b in edges]


def groups_of(graph: nx.Graph[Axis], axis: Axis) -> list[Group]:
    """Return the groups whose units ``axis`` holds, in order of execution of their triggers."""
    expr = graph.nodes[axis]["expr"]
    return [group for group in find_groups(graph) if group.factor is not None and contains(expr, group.factor)]


def _step(graph: nx.Graph[Axis], a: Axis, b: Axis) -> Step:
    edge = graph.edges[a, b]
    return Step(a, b, edge["op"], edge["node"], axis_map(graph).rules.get(edge["node"], ""))


def exactness(axes: AxisMap, group: Group) -> str:
    """Return what removing units of ``group`` is, next to masking them.

    ``exact``: the same. ``masked``: the same, as a norm that runs over them is kept as masking has it.
    ``renormalised``: the same up to a norm, or another statistic, that is then one of the units that stay.
    """
    if group.renormalised:
        return "renormalised"
    return "masked" if group.factor is not None and axes.keeps_norm_over(group.factor) else "exact"


def frozen_axes(graph: nx.Graph[Axis]) -> dict[str, Freeze]:
    """Return the first reason for each parameter axis with a frozen factor, as ``"name[axis]"``."""
    return frozen_in(axis_map(graph))


def frozen_in(axes: AxisMap) -> dict[str, Freeze]:
    """As :func:`frozen_axes`, of solved axes."""
    found: dict[str, Freeze] = {}
    for name in axes.parameters:
        for i, expr in enumerate(axes.tensors[name]):
            reason = next((axes.frozen[f] for f in factors(expr) if f in axes.frozen), None)
            if reason is not None:
                found[f"{name}[{i}]"] = reason
    return found


def unruled(axes: AxisMap) -> dict[str, list[str]]:
    """Return the parameter axes that ops without a rule froze, by op; the first reason of each axis counts."""
    found: dict[str, list[str]] = {}
    for axis, freeze in frozen_in(axes).items():
        if freeze.node in axes.unruled:
            found.setdefault(axes.unruled[freeze.node], []).append(axis)
    return found
