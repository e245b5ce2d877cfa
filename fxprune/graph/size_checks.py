"""The limits that a graph puts to the sizes of its inputs, as checks among its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxprune.graph.compat import is_check

__all__ = ["limits_of", "refusal"]


def limits_of(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Return what the checks of a graph say, in words."""
    return tuple(str(node.args[1]) for node in graph_module.graph.nodes if is_check(node))


def refusal(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> str:
    """Return what the first check says that refuses ``inputs``; empty where all take them. Nothing else is run.

    Sizes at which a check cannot be worked out are refused as well: the graph does not run at them.
    """
    checks = [node for node in graph_module.graph.nodes if is_check(node)]
    needed: set[fx.Node] = set()
    pending = list(checks)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    values: dict[fx.Node, Any] = {}
    for node in (node for node in graph_module.graph.nodes if node in needed):
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)] if str(node.target) in inputs else node.args[0]
            continue
        args = fx.map_arg(node.args, lambda source: values[source])
        if is_check(node):
            if not args[0]:
                return str(args[1])
            continue
        try:
            values[node] = node.target(*args) if callable(node.target) else None
        except ZeroDivisionError:  # parts of a size that is too small to have that many
            return f"{node.name} divides by zero"
    return ""
