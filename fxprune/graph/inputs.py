"""The inputs of a graph: tensors, containers that the graph reads tensors off, and values that are no tensor."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import tree_map

__all__ = ["example_of", "input_tensors", "is_input"]


def is_input(node: fx.Node) -> bool:
    """Whether ``node`` is an input of its graph, or something read off one that is a container."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def input_tensors(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Yield the node of each tensor that is passed to a graph, and how Python code spells it: ``x``, ``xs[0]``."""
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "placeholder":
            names[node] = str(node.target)
        elif node.target is operator.getitem and source in names:
            names[node] = f"{names[source]}[{node.args[1]!r}]"
    yield from ((node, name) for node, name in names.items() if isinstance(node.meta.get("val"), torch.Tensor))


def example_of(value: Any, make: Any) -> Any:
    """Return an input like the one that was traced: ``make(tensor)`` for each tensor, the rest as it was."""
    return tree_map(lambda leaf: make(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
