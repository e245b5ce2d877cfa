"""Axes and groups by the names that people type: whole, or as much of them as tells them apart."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

import networkx as nx

from fxprune.discovery.dependency import axis_map
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError, UnknownNameError
from fxprune.rules.statements import Axis

__all__ = ["find_axis", "find_group"]

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
