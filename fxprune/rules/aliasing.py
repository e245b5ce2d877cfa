"""Ops with several spellings, and values that share memory."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from fxprune.graph.compat import OpOverload
from fxprune.rules.registry import find_rule

__all__ = ["Respell", "alias_roots", "find_spelling", "may_alias", "regroups", "spelling", "writes", "written_sources"]

Respell = Callable[[fx.Node, fx.GraphModule], None]
"""Changes a node, and what is before it, in place; values do not change."""

_SPELLINGS: dict[str, Respell] = {}


def spelling(*names: str) -> Callable[[Respell], Respell]:
    """Respell the ops ``names`` with the decorated function.

    Args:
        names: ops with their overload (``"slice.Tensor"``; ``"view"`` for the default one), of ATen unless they say.
    """

    def decorate(function: Respell) -> Respell:
        for name in names:
            _SPELLINGS[name if "::" in name else f"aten::{name}"] = function
        return function

    return decorate


def find_spelling(target: object) -> Respell | None:
    """What respells an op, if it has another spelling."""
    return _SPELLINGS.get(target.name()) if isinstance(target, OpOverload) else None


def may_alias(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share memory with its first input, as its schema says or not."""
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    rule = find_rule(node.target)
    unsaid = rule is not None and rule.may_alias
    return unsaid or any(result.alias_info is not None for result in node.target._schema.returns)


def regroups(node: fx.Node) -> bool:
    """Whether ``node`` groups axes anew, which a view cannot do for any layout in memory."""
    rule = find_rule(node.target)
    return rule is not None and rule.regroups


def writes(node: fx.Node) -> bool:
    """Whether ``node`` writes to one of its inputs."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def alias_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the first one whose memory it may share."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        root[node] = root[first] if isinstance(first, fx.Node) and may_alias(node) else node
    return root


def written_sources(graph: fx.Graph) -> set[str]:
    """Return the names of inputs and weights of a graph to which an op writes, itself or through another value."""
    root = alias_roots(graph)
    written = {root[value] for node in graph.nodes if writes(node) for value in _written_by(node)}
    return {str(node.target) for node in written if node.op in ("placeholder", "get_attr")}


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The inputs that an op writes to, as its schema says."""
    found = []
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [value] if isinstance(value, fx.Node) else []
    return found
