"""Explanations: why an axis is in a group, or frozen; look-up of axes and groups by abbreviated names."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxprune.axes import Freeze, factors
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.discovery.groups import Group, axes_by_factor, find_groups
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import instance, refuse
from fxprune.rules.statements import Axis

_LISTED = 6
"""Most names to list for an ambiguous one."""

_INDEXED = re.compile(r"(?P<name>.*)\[(?P<dim>-?\d{1,9})\]")


def find_axis(graph: nx.Graph[Axis], name: str, dim: int | None = None) -> Axis:
    """Return the axis of a tensor by an abbreviated name.

    Args:
        name: of a tensor: all of it, its end, or the end of its module's path, as in ``layers.3.norm``, for the
            module's weight. A ``*`` stands for any number. The axis may follow in brackets.
        dim: number of the axis; None if the tensor has only one, or ``name`` has it in brackets.

    Raises:
        UnknownNameError: no tensor has this name; suggests the nearest.
        ArgumentError: the name is ambiguous, or the tensor has no such axis.
    """
    indexed = _INDEXED.fullmatch(name)
    if indexed is not None:
        name, bracketed = indexed["name"], int(indexed["dim"])
        if dim is not None and dim != bracketed:
            raise ArgumentError(f"axis {bracketed} and axis {dim} are requested", where=name, remedy="Name one axis")
        dim = bracketed
    axes = axis_map(graph)
    tensor = name if name in axes.tensors else _find_tensor(name, axes.weights())
    count = len(axes.tensors[tensor])
    if dim is None and count != 1:
        raise ArgumentError(_has(count), where=tensor, remedy=f"Name one, as in {name}[0]")
    target = Axis(tensor, dim or 0)
    if target not in graph:
        raise ArgumentError(f"there is no axis {dim}: it {_has(count)}", where=tensor, remedy="Name one of these")
    return target


def find_group(groups: Iterable[Group], name: str) -> Group:
    """Return a group by its name or the end of it: ``layers.3/mlp``, or ``mlp`` if there is only one."""
    known = {group.name: group for group in groups}
    found = [name] if name in known else [full for full in known if _ends(full, name)]
    if not found:
        raise UnknownNameError("group", name, known)
    return known[_only(name, found)]


def _find_tensor(name: str, weights: Collection[str]) -> str:
    found = [full for full in weights if _ends(full, name)]
    if not found:
        inside = [full for full in weights if _ends(full.rpartition(".")[0], name)]
        found = [full for full in inside if full.endswith(".weight")] or inside
    if not found:
        parts = name.count(".") + 1
        ends = {".".join(full.split(".")[-parts:]) for full in weights}
        modules = {".".join(full.split(".")[:-1][-parts:]) for full in weights}
        near = difflib.get_close_matches(name, sorted(ends | modules), n=3, cutoff=0.7) or weights
        raise UnknownNameError("parameter or buffer", name, near)
    return _only(name, found)


def _only(name: str, found: list[str]) -> str:
    if len(found) > 1:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        what = f"the name is ambiguous: it may be {', '.join(found[:_LISTED])}{more}"
        raise ArgumentError(what, where=name, remedy="Add as much of the name as distinguishes them")
    return found[0]


def _ends(full: str, name: str) -> bool:
    """Whether ``full`` is ``name`` or ends in it after a dot or a slash; ``*`` stands for any number."""
    pattern = re.escape(name).replace(r"\*", r"\d+")
    return re.search(rf"(^|[./]){pattern}$", full) is not None


def _has(count: int) -> str:
    numbers = [str(i) for i in range(count)]
    listed = " and ".join((", ".join(numbers[:-1]), numbers[-1])) if count > 1 else "".join(numbers)
    return f"has {count} {'axis' if count == 1 else 'axes'}{', ' if numbers else ''}{listed}"


@dataclass(frozen=True)
class Step:
    """One coupling on the path from a trigger to a member: an op, at a node, ties the axis ``target`` to ``source``.

    ``rule`` is the rule of the op as text; empty if the coupling is of two names of one tensor.
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
        member: tensor name and axis; the name as :func:`find_axis` takes it, as in ``("layers.3.mixer.proj", 0)``.
        group: one of the groups of the axis; None for the first.

    Raises:
        ArgumentError: an argument is of the wrong type, the name is ambiguous, or there is no such axis.
        UnknownNameError: no such tensor; suggests the nearest.
        FxpruneError: the axis is in no group; gives the reason if it is frozen.
    """
    axes = axis_map(graph)
    given: Any = member
    if not isinstance(given, tuple) or [type(part) for part in member] != [str, int]:
        raise refuse("member", member, "the name of a tensor and the number of its axis, as in ('embed.weight', 0)")
    if group is not None:
        instance("group", group, Group, "one of fxprune.find_groups(graph), or None")
    target = find_axis(graph, *member)
    expr = graph.nodes[target]["expr"]
    chosen = group or next(iter(groups_of(graph, target)), None)
    if chosen is None or chosen.factor is None or chosen.trigger is None or chosen.factor not in factors(expr):
        reason = next((str(axes.frozen[f]) for f in factors(expr) if f in axes.frozen), "it holds no removable unit")
        remedy = "Ask for an axis of one of fxprune.find_groups(graph), and of this graph"
        what = f"axis {target.dim} is in no such group: {reason}"
        raise FxpruneError(what, where=target.tensor, remedy=remedy, shell="`fxprune graph` lists the groups")
    inside = graph.subgraph(axes_by_factor(graph)[chosen.factor])
    steps = []
    for source, reached in itertools.pairwise(nx.shortest_path(inside, chosen.trigger, target)):
        edge = graph.edges[source, reached]
        steps.append(Step(source, reached, edge["op"], edge["node"], axes.rules.get(edge["node"], "")))
    return steps


def groups_of(graph: nx.Graph[Axis], axis: Axis) -> list[Group]:
    """Return the groups whose units lie along ``axis``, in order of execution of their triggers."""
    expr = graph.nodes[axis]["expr"]
    return [group for group in find_groups(graph) if group.factor in factors(expr)]


def exactness(axes: AxisMap, group: Group) -> str:
    """How removing units of ``group`` compares with masking them.

    ``exact``: equal. ``masked``: equal, because a norm over them is rescaled. ``renormalised``: equal up to a norm, or
    another statistic, that is then taken over the kept units.
    """
    if group.renormalised:
        return "renormalised"
    return "masked" if group.factor is not None and axes.keeps_norm_over(group.factor) else "exact"


def frozen_axes(graph: nx.Graph[Axis]) -> dict[str, Freeze]:
    """Return the first reason for each parameter axis with a frozen factor, as ``"name[axis]"``."""
    return frozen_in(axis_map(graph))


def frozen_in(axes: AxisMap) -> dict[str, Freeze]:
    """As :func:`frozen_axes`, for solved axes."""
    found: dict[str, Freeze] = {}
    for name in axes.parameters:
        for i, expr in enumerate(axes.tensors[name]):
            reason = next((axes.frozen[f] for f in factors(expr) if f in axes.frozen), None)
            if reason is not None:
                found[f"{name}[{i}]"] = reason
    return found


def unruled(axes: AxisMap) -> dict[str, list[str]]:
    """Return the parameter axes that no rule covers, by reason; the first reason of each axis counts."""
    found: dict[str, list[str]] = {}
    for axis, freeze in frozen_in(axes).items():
        if freeze.node in axes.unruled:
            found.setdefault(freeze.reason, []).append(axis)
    return found
