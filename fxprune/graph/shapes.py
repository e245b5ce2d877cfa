"""Shapes of values: metadata, size checks, and runs on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    is_check,
    storage_of,
    tree_leaves,
    tree_map,
)
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import comparable

__all__ = [
    "ShapedCalls",
    "WorkedOutOnce",
    "calls_of",
    "described",
    "limits_of",
    "refusal",
    "retype",
    "same_shapes",
    "usable",
]


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


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What equals what is spelled alike."""

_FRESH: dict[OpOverload, bool] = {}
"""Whether an op, by its schema, writes to nothing and returns nothing that it was given."""


class WorkedOutOnce(TorchDispatchMode):
    """While it lasts, an op on ``meta`` that was called alike before returns new tensors like those that it made then.

    The code of a model runs in full, block after block; but what torch works out of shapes, in Python, takes most of
    the time of a run on ``meta``, and blocks that are alike have it worked out again and again. Views, ops that write
    and whatever has a tensor with storage run as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[object, tuple[type[Any] | None, tuple[_Like, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        made = self._made.get(key)
        if made is None:
            result = func(*args, **kwargs)
            likes = _likes(result, (args, kwargs))
            if likes is not None:
                self._made[key] = None if isinstance(result, torch.Tensor) else type(result), likes
            return result
        kind, likes = made
        tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in likes]
        return tensors[0] if kind is None else kind(tensors)


_Like = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _key(func: Any, args: Any, kwargs: Any) -> object:
    """What decides the shapes that an op makes; None where it has to be run."""
    if not isinstance(func, OpOverload) or not _is_fresh(func):
        return None
    try:
        said = _said(args), tuple((name, _said(value)) for name, value in kwargs.items())
    except TypeError:
        return None
    return func, said, torch.get_default_dtype()


def _is_fresh(func: OpOverload) -> bool:
    if func not in _FRESH:
        schema = func._schema
        _FRESH[func] = all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    return _FRESH[func]


def _said(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not value.is_meta or value.is_conj():
            raise TypeError("more than a shape")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_said, value))
    if isinstance(value, _PLAIN):
        return type(value), value
    raise TypeError("not known")


def _likes(result: Any, inputs: Any) -> tuple[_Like, ...] | None:
    """What to make the same results of; None where they are more than new tensors of some shape."""
    tensors = [result] if isinstance(result, torch.Tensor) else result
    if type(tensors) not in (list, tuple) or not all(type(t) is torch.Tensor and t.is_meta for t in tensors):
        return None
    storages = [storage_of(tensor) for tensor in tensors]
    given = {storage_of(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    if len(set(storages)) < len(storages) or not given.isdisjoint(storages):
        return None
    if any(tensor.storage_offset() or tensor.is_conj() or tensor.is_neg() for tensor in tensors):
        return None
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
