"""Ops with several spellings, and values that share memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxprune.graph.compat import OpOverload
from fxprune.rules.registry import find_rule

__all__ = [
    "alias_roots",
    "find_spelling",
    "may_alias",
    "regroups",
    "spelling",
    "writes",
    "written_arguments",
    "written_sources",
]

Respell = Callable[[fx.Node, fx.GraphModule], None]
"""Rewrites a node in place, possibly adding nodes before it; values do not change."""

_SPELLINGS: dict[str, Respell] = {}


def spelling(*names: str) -> Callable[[Respell], Respell]:
    """Register the decorated function as the rewrite of ATen ops (``"slice.Tensor"``) to their canonical spelling."""

    def decorate(function: Respell) -> Respell:
        for name in names:
            _SPELLINGS[f"aten::{name}"] = function
        return function

    return decorate


def find_spelling(target: object) -> Respell | None:
    """The rewrite of an op to its canonical spelling; None if it has none."""
    return _SPELLINGS.get(target.name()) if isinstance(target, OpOverload) else None


def may_alias(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share memory with its first input, whether its schema declares it or not."""
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    rule = find_rule(node.target)
    undeclared = rule is not None and rule.may_alias
    return undeclared or any(result.alias_info is not None for result in node.target._schema.returns)


def regroups(node: fx.Node) -> bool:
    """Whether ``node`` regroups axes, which a view cannot do for every memory layout."""
    rule = find_rule(node.target)
    return rule is not None and rule.regroups


def writes(node: fx.Node) -> bool:
    """Whether ``node`` writes to one of its inputs."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def alias_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node, the first node whose memory it may share."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        root[node] = root[first] if isinstance(first, fx.Node) and may_alias(node) else node
    return root


def written_sources(graph: fx.Graph) -> set[str]:
    """Names of the inputs and weights of a graph that some op writes to, directly or through a view."""
    root = alias_roots(graph)
    written: set[str] = set()
    for node in filter(writes, graph.nodes):
        for value in written_arguments(node.target, node.args, node.kwargs):
            if isinstance(value, fx.Node) and root[value].op in ("placeholder", "get_attr"):
                written.add(str(root[value].target))
    return written


def written_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a call of ``op`` writes to."""
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
