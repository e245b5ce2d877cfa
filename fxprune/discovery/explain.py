"""Why an axis is in a group, or frozen; axes and groups by the names that people type."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxprune.axes import Freeze, contains, factors
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.discovery.groups import Group, axes_by_factor, find_groups
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import instance, refuse
from fxprune.rules.statements import Axis

__all__ = [
    "Step",
    "exactness",
    "explain",
    "find_axis",
    "find_group",
    "frozen_axes",
    "frozen_in",
    "groups_of",
    "unruled",
]

_LISTED = 6
"""How many names a message lists that all could be meant."""

_INDEXED = re.compile(r"(?P<name>.*)\[(?P<dim>-?\d{1,9})\]")


def find_axis(graph: nx.Graph[Axis], name: str, dim: int | None = None) -> Axis:
    """Return the axis that is meant.

    Args:
        graph: the dependency graph.
        name: of a tensor: all of it, its end, or the end of the module that it is in, as in ``layers.3.norm``; of
            a module's tensors the weight is meant. A ``*`` stands for any number. The axis may follow in brackets.
        dim: which axis of it; None where it has one, or where ``name`` says it.

    Raises:
        UnknownNameError: nothing is called so; suggests the nearest.
        ArgumentError: several tensors are called so, or the tensor has no such axis.
    """
    indexed = _INDEXED.fullmatch(name)
    if indexed is not None:
        name, said = indexed["name"], int(indexed["dim"])
        if dim is not None and dim != said:
            raise ArgumentError(f"axis {said} and axis {dim} are asked for", where=name, remedy="Say it once")
        dim = said
    axes = axis_map(graph)
    tensor = name if name in axes.tensors else _find_tensor(name, axes.weights())
    count = len(axes.tensors[tensor])
    if dim is None and count != 1:
        raise ArgumentError(_has(count), where=tensor, remedy=f"Say which, as in {name}[0]")
    target = Axis(tensor, dim or 0)
    if target not in graph:
        raise ArgumentError(f"there is no axis {dim}: it {_has(count)}", where=tensor, remedy="Ask for one of these")
    return target


def find_group(groups: Iterable[Group], name: str) -> Group:
    """Return the group of this name, or the one whose name ends so: ``layers.3/mlp``, or ``mlp`` among a few.

    Raises:
        UnknownNameError: no group is called so; suggests the nearest.
        ArgumentError: several are.
    """
    known = {group.name: group for group in groups}
    found = [name] if name in known else [full for full in known if _ends(full, name)]
    if not found:
        raise UnknownNameError("group", name, known)
    return known[_only(name, found)]


def _find_tensor(name: str, weights: Collection[str]) -> str:
    """Return the parameter or buffer that is called so in short."""
    found = [full for full in weights if _ends(full, name)]
    if not found:
        inside = [full for full in weights if _ends(full.rpartition(".")[0], name)]
        found = [full for full in inside if full.endswith(".weight")] or inside
    if not found:
        parts = name.count(".") + 1
        ends = {".".join(full.split(".")[-parts:]) for full in weights}
        modules = {".".join(full.split(".")[:-1][-parts:]) for full in weights}
        near = _spelled(name, ends | modules) or weights
        raise UnknownNameError("parameter or buffer", name, near)
    return _only(name, found)


def _spelled(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)


def _only(name: str, found: list[str]) -> str:
    if len(found) > 1:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise ArgumentError(
            f"{len(found)} are called so: {', '.join(found[:_LISTED])}{more}",
            where=name,
            remedy="Say as much of the name as tells them apart",
        )
    return found[0]


def _ends(full: str, name: str) -> bool:
    """Whether ``full`` is ``name``, or ends so after a dot or a slash; ``*`` stands for any number."""
    pattern = re.escape(name).replace(r"\*", r"\d+")
    return re.search(rf"(^|[./]){pattern}$", full) is not None


def _has(count: int) -> str:
    numbers = [str(i) for i in range(count)]
    listed = " and ".join((", ".join(numbers[:-1]), numbers[-1])) if count > 1 else "".join(numbers)
    return f"has {count} {'axis' if count == 1 else 'axes'}{', ' if numbers else ''}{listed}"


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
