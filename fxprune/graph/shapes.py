"""What is known about the shapes of values, and of which of them it still holds after a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.graph.arguments import comparable
from fxprune.graph.compat import FakeTensor, FakeTensorMode, tree_leaves, tree_map
from fxprune.graph.facts import Fact

__all__ = ["ShapedCalls", "calls_of", "described", "retype", "same_shapes", "usable"]


@dataclass(frozen=True)
class ShapedCalls(Fact):
    """How each node was called when its ``node.meta["val"]`` was worked out.

    A node that is called in the same way on values of the same shapes needs no second look.

    Args:
        calls: target and arguments, by name of the node.
    """

    calls: Mapping[str, object]


def calls_of(graph: fx.Graph) -> dict[str, object]:
    """Return how each node is called: its target and its arguments, with nodes by their names."""
    return {node.name: call_of(node) for node in graph.nodes}


def call_of(node: fx.Node) -> object:
    """Return how ``node`` is called, as something that compares."""
    return node.op, node.target, comparable(node.args), comparable(node.kwargs)


def usable(value: Any, mode: FakeTensorMode) -> bool:
    """Whether ``value``, of ``node.meta["val"]``, can be an input of an op in ``mode``."""
    return value is not None and all(
        not isinstance(leaf, torch.Tensor) or (isinstance(leaf, FakeTensor) and leaf.fake_mode is mode)
        for leaf in tree_leaves(value)
    )


def retype(graph: fx.Graph, before: torch.dtype, after: torch.dtype) -> None:
    """Give values of a graph that have elements of one type another one; shapes and strides stay as they are."""
    made: dict[object, torch.Tensor] = {}

    def other(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or value.dtype != before:
            return value
        key = str(_traits(value))
        if key not in made:
            with value.fake_mode:
                made[key] = torch.empty_strided(value.shape, value.stride(), dtype=after, device=value.device)
        return made[key]

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(other, node.meta["val"])


def same_shapes(one: Any, other: Any) -> bool:
    """Whether two values agree in all that decides what ops make of them, but for numbers in tensors.

    Sizes that are not known yet agree if they are spelled alike; nothing is found out about them.
    """
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(_traits(a) == _traits(b) for a, b in zip(ones, others, strict=True))


def described(value: Any) -> object:
    """Return what ``value``, an argument of an op, has that decides the shape of its result, as something that hashes.

    Raises:
        TypeError: it holds something else than tensors without numbers, sizes and constants.
    """
    if isinstance(value, tuple | list):
        return type(value), tuple(described(item) for item in value)
    if isinstance(value, torch.Tensor):
        if not isinstance(value, FakeTensor) or value.constant is not None:
            raise TypeError(f"a tensor with numbers: {value}")
        return _traits(value)
    hash(value if getattr(value, "node", None) is None else value.node.expr)
    return _spelled(value)


def _traits(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return _spelled(value)
    sizes = tuple(_spelled(size) for size in (*value.shape, *value.stride()))
    return type(value) is FakeTensor, value.dtype, value.device, sizes


def _spelled(value: Any) -> object:
    """A number, or the expression of one that is not known yet."""
    node = getattr(value, "node", None)
    return (type(value), value) if node is None else (type(value), node.expr)
