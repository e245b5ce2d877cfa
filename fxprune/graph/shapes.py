"""Shapes of values: metadata, size checks, and a cache of ops on ``meta``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

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
from fxprune.graph.tensors import comparable, upstream


@dataclass(frozen=True)
class ShapedCalls(Fact):
    """The call of each node when its value was computed; an equal call on equal shapes need not be computed again."""

    open: ClassVar[bool] = True

    calls: Mapping[str, object]


def calls_of(graph: fx.Graph) -> dict[str, object]:
    """Return the call of each node: its target and its arguments, with nodes by their names."""
    return {node.name: (node.op, node.target, comparable(node.args), comparable(node.kwargs)) for node in graph.nodes}


def fits_mode(value: Any, mode: FakeTensorMode) -> bool:
    """Whether a ``node.meta["val"]`` can be an input of an op in ``mode``."""
    return value is not None and all(
        not isinstance(leaf, torch.Tensor) or (isinstance(leaf, FakeTensor) and leaf.fake_mode is mode)
        for leaf in tree_leaves(value)
    )


def change_dtype(graph: fx.Graph, before: torch.dtype, after: torch.dtype) -> None:
    """Change the dtype of recorded values that have dtype ``before``; shapes and strides stay."""
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
    """Whether two values agree in everything that decides the results of ops, except the contents of tensors.

    Symbolic sizes agree if their expressions are equal; comparing them sets no guard.
    """
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(_traits(a) == _traits(b) for a, b in zip(ones, others, strict=True))


def shape_key(value: Any, of_tensor: Callable[[torch.Tensor], object] | None = None) -> object:
    """Hashable key of what decides the shape of an op's result in an argument; a ``TypeError`` for anything else.

    ``of_tensor`` makes the keys of tensors, which are fake ones by default.
    """
    if isinstance(value, tuple | list):
        return type(value), tuple(shape_key(item, of_tensor) for item in value)
    if isinstance(value, torch.Tensor):
        if of_tensor is not None:
            return of_tensor(value)
        if not isinstance(value, FakeTensor) or value.constant is not None:
            raise TypeError(f"a tensor with contents: {value}")
        return _traits(value)
    hash(value if getattr(value, "node", None) is None else value.node.expr)
    return _number_key(value)


def _traits(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return _number_key(value)
    sizes = tuple(_number_key(size) for size in (*value.shape, *value.stride()))
    return type(value) is FakeTensor, value.dtype, value.device, sizes


def _number_key(value: Any) -> object:
    """A number, or the expression of a symbolic one; with its type, as ``1 == True``."""
    node = getattr(value, "node", None)
    return (type(value), value) if node is None else (type(value), node.expr)


def failed_check(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> str:
    """Return the message of the first check that fails for ``inputs``, or "". Only the checks are run.

    A check that cannot be computed at some sizes fails as well: the graph does not run at them.
    """
    needed = set(upstream(filter(is_check, graph_module.graph.nodes)))
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
        except ZeroDivisionError:  # a size divided by a number of parts that is 0 at these inputs
            return f"{node.name} divides by zero"
    return ""


class MetaOpCache(TorchDispatchMode):
    """Cache of ops on ``meta``: an op called with equal arguments again returns new tensors like its first results.

    The code of a model runs in full, block after block. Computing shapes, in Python, takes most of the time of a run on
    ``meta``, and equal blocks repeat it. Views, ops that write, and ops on a tensor with storage run as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[object, tuple[type[Any] | None, tuple[_Layout, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, key = kwargs or {}, None
        if isinstance(func, OpOverload) and _returns_new_tensors(func):
            with suppress(TypeError):  # an argument without a key: the op must run
                key = func, shape_key((args, *kwargs.items()), _layout), torch.get_default_dtype()
        if key is None:
            return func(*args, **kwargs)
        if key not in self._made:
            result = func(*args, **kwargs)
            layouts = _new_layouts(result, (args, kwargs))
            if layouts is not None:
                self._made[key] = None if isinstance(result, torch.Tensor) else type(result), layouts
            return result
        kind, layouts = self._made[key]
        tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in layouts]
        return tensors[0] if kind is None else kind(tensors)


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


@cache
def _returns_new_tensors(func: OpOverload) -> bool:
    return all(value.alias_info is None for value in (*func._schema.arguments, *func._schema.returns))


def _layout(tensor: torch.Tensor) -> _Layout:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_meta or tensor.is_conj():
        raise TypeError("a tensor that is more than its layout")
    return tensor.shape, tensor.stride(), tensor.dtype


def _new_layouts(result: Any, inputs: Any) -> tuple[_Layout, ...] | None:
    """Layouts of the results of an op; None if they are not all new tensors on ``meta``."""
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
