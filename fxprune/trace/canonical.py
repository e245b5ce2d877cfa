"""Canonical form of a graph: spellings of ops that stay right when sizes change, and constants folded to buffers.

``2 ** -arange(heads)`` computed for fewer heads gives other numbers, so such values are computed once and stored. A
constant that is the same everywhere is left alone: it takes the size of whatever it is used with. A ``view`` (of an
input that may become non-contiguous) is a ``reshape``; ``chunk`` and ``split`` are ``split_with_sizes``.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.compat import OpOverload, is_impure, is_random, tree_leaves
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.rules.registry import alias_roots, may_alias, regroups, writes

aten = torch.ops.aten

MAX_CONSTANT_ELEMENTS = 1 << 20
"""Larger values are recomputed by the graph each time: 4 MiB in float32, so that no mask of a long context is kept."""


def fold_constants(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Fold position-dependent constants of static size to buffers named ``constant_0``, ``constant_1``, ..

    Tensors of ``model``, from which the graph was traced, are not constants: users may load others into it.
    """
    constant = _constant_nodes(graph_module, model)
    values = _ConstantValues(graph_module, constant)
    names = (name for i in itertools.count() if not hasattr(model, name := f"constant_{i}"))
    for node in constant:
        if node.op == "get_attr" or all(user in constant for user in node.users):
            continue
        value, fake = values.of(node), node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.numel() < 2 or not bool((value != value.reshape(-1)[0]).any()):
            continue
        name = next(names)
        graph_module.register_buffer(name, value)
        with node.graph.inserting_before(node):
            new = node.graph.create_node("get_attr", name, name=name)
            new.meta = {**node.meta, "val": fake.to(value.dtype)}
            if fake.dtype != value.dtype:
                new = node.graph.call_function(aten.to.dtype, (new, values.dtype_node))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)


def move_constants(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Move the tensors of a graph that are not tensors of ``model`` to its device."""
    device = next(model.parameters()).device
    for name, value in weights(graph_module):
        if value.device != device and not _has(model, name):
            set_tensor(graph_module, name, value.to(device))


def _constant_nodes(graph_module: fx.GraphModule, model: nn.Module) -> dict[fx.Node, None]:
    """The nodes whose value is the same in every run, in order; values that are written to in place are excluded."""
    environment = {node for node in graph_module.graph.nodes if node.target is getattr}
    root = alias_roots(graph_module.graph)
    dirty = {root[node] for node in root if writes(node)}
    found: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            known = not _has(model, str(node.target))
        elif isinstance(node.target, OpOverload):
            known = not writes(node) and not is_random(node.target)
        else:
            known = node.target is operator.getitem
        known = known and all(source in found or source in environment for source in node.all_input_nodes)
        if known and root[node] not in dirty and _is_small(node.meta.get("val")):
            found[node] = None
    return found


def _has(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(owner), leaf)
    except AttributeError:
        return False


def _is_small(value: Any) -> bool:
    """Whether ``value`` is one tensor or several, each with a static number of elements below the limit."""
    leaves = tree_leaves(value)
    sizes = [leaf.numel() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    return bool(sizes) and all(isinstance(size, int) and size <= MAX_CONSTANT_ELEMENTS for size in sizes)


class _ConstantValues:
    """The values of constant nodes, computed on the CPU on demand.

    Values in the dtype of the model are computed in float32 or wider, and cast when the graph reads them.
    """

    def __init__(self, graph_module: fx.GraphModule, constant: Mapping[fx.Node, None]) -> None:
        self.graph_module = graph_module
        self.constant = constant
        self.known: dict[fx.Node, Any] = {}
        reads = (n for n in graph_module.graph.nodes if n.target is getattr and n.args[1] == "dtype")
        self.dtype_node: fx.Node | None = next(reads, None)
        self.dtype = torch.float32
        if self.dtype_node is not None and isinstance(source := self.dtype_node.args[0], fx.Node):
            self.dtype = torch.promote_types(get_tensor(graph_module, str(source.target)).dtype, torch.float32)

    def of(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return get_tensor(self.graph_module, str(node.target)).cpu()
        if node not in self.constant:
            return self.dtype if node is self.dtype_node else torch.device("cpu")
        if node not in self.known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
            with torch.no_grad():
                self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.known[node]


_Respell = Callable[[fx.Node, fx.GraphModule], None]
"""Rewrites a node in place, possibly adding nodes before it; values do not change."""

_SPELLINGS: dict[str, _Respell] = {}


def _spelling(*names: str) -> Callable[[_Respell], _Respell]:
    """Register the decorated function as the rewrite of ATen ops (``"slice.Tensor"``) to their canonical spelling."""

    def decorate(function: _Respell) -> _Respell:
        _SPELLINGS.update((f"aten::{name}", function) for name in names)
        return function

    return decorate


def canonicalize(graph_module: fx.GraphModule) -> None:
    """Rewrite the ops of a graph to their canonical spelling; values do not change."""
    for node in list(graph_module.graph.nodes):
        if isinstance(node.target, OpOverload) and node.target.name() in _SPELLINGS:
            _SPELLINGS[node.target.name()](node, graph_module)


def remove_in_place_ops(graph_module: fx.GraphModule) -> None:
    """Replace ``x.add_(y)`` by ``x.add(y)`` if nothing else can see ``x``; values do not change.

    A tensor that a remaining in-place op writes to through a view of another shape is made contiguous: once sizes have
    changed, a reshape of anything else may be a copy, and writes to the copy would be lost.
    """
    for node in list(graph_module.graph.nodes):
        target = _out_of_place(node)
        if target is not None and _is_unshared(node.args[0], node, node):
            node.target = target
        if is_impure(node) and node.op == "call_function" and isinstance(node.args[0], fx.Node):
            root, reshaped = node.args[0], False
            while may_alias(root) and isinstance(root.args[0], fx.Node):
                reshaped = reshaped or regroups(root)
                root = root.args[0]
            if reshaped and root.op == "call_function":
                contiguous = _insert_copy(root, root.next)
                root.replace_all_uses_with(contiguous, delete_user_cb=partial(operator.is_not, contiguous))


@_spelling("view", "reshape", "_unsafe_view")
def _reshape(node: Any, graph_module: fx.GraphModule) -> None:
    node.target = aten.reshape.default
    source, sizes = node.args
    known = node.meta["val"].shape
    explicit = [known[i] if size == -1 and isinstance(known[i], int) else size for i, size in enumerate(sizes)]
    node.args = (source, explicit)


@_spelling("chunk", "split.Tensor")
def _split(node: Any, graph_module: fx.GraphModule) -> None:
    source, _, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (source, sizes, dim), {}


@_spelling("slice.Tensor")
def _slice(node: Any, graph_module: fx.GraphModule) -> None:
    """Count bounds from the front: then only units removed before them move them."""
    source, *rest = node.args
    dim = rest[0] if rest else 0
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        bounds = [max(bound + size, 0) if isinstance(bound, int) and bound < 0 else bound for bound in rest[1:3]]
        node.args = (source, dim, *bounds, *rest[3:])


@_spelling("narrow")
def _narrow(node: Any, graph_module: fx.GraphModule) -> None:
    source, dim, start, length = node.args
    size = source.meta["val"].shape[dim]
    if isinstance(start, int) and isinstance(length, int) and isinstance(size, int):
        first = start + size if start < 0 else start
        node.target, node.args = aten.slice.Tensor, (source, dim, first, first + length)


@_spelling("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(node: Any, graph_module: fx.GraphModule) -> None:
    """Name the axes of size 1, so that an axis with a single unit left stays."""
    source, *dims = node.args
    shape = source.meta["val"].shape
    named = range(len(shape)) if not dims else dims[0] if isinstance(dims[0], list | tuple) else dims
    found = [i % len(shape) for i in named if isinstance(i, int)] if shape else []
    node.target = aten.squeeze.dims
    node.args = (source, [i for i in found if isinstance(shape[i], int) and shape[i] == 1])


@_spelling("unflatten.int")
def _unflatten(node: Any, graph_module: fx.GraphModule) -> None:
    source, dim, sizes = node.args
    shape = source.meta["val"].shape
    dim %= len(shape)
    outer = _sizes(source, node, but=dim)
    node.args = (source, [*outer[:dim], *sizes, *outer[dim + 1 :]])
    _reshape(node, graph_module)


@_spelling("reshape_as", "view_as")
def _reshape_as(node: Any, graph_module: fx.GraphModule) -> None:
    """Read the sizes of the other tensor: its axes are not otherwise related to those of the result."""
    source, other = node.args
    node.args = (source, _sizes(other, node))
    _reshape(node, graph_module)


def _sizes(source: fx.Node, before: fx.Node, but: int | None = None) -> list[Any]:
    """The sizes of ``source``: numbers if static, else (except for axis ``but``) nodes inserted ``before`` a node."""
    found: list[Any] = []
    with before.graph.inserting_before(before):
        for axis, size in enumerate(source.meta["val"].shape):
            if isinstance(size, int) or axis == but:
                found.append(size)
                continue
            symbol = before.graph.call_function(aten.sym_size.int, (source, axis))
            symbol.meta["val"] = size
            found.append(symbol)
    return found


@_spelling("scaled_dot_product_attention")
def _attention(node: Any, graph_module: fx.GraphModule) -> None:
    query = node.args[0]
    width = query.meta["val"].shape[-1]
    if node.kwargs.get("scale") is None and len(node.args) < 7 and isinstance(width, int):
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(width)}


@_spelling("view_as_complex")
def _view_as_complex(node: Any, graph_module: fx.GraphModule) -> None:
    """Copy the input: pairs must start at even offsets, which those of a slice may no longer do."""
    source = node.args[0]
    node.args = (_insert_copy(source, node),)


@_spelling("index.Tensor")
def _index(node: Any, graph_module: fx.GraphModule) -> None:
    """Replace ``x[.., [i, i + 1, ..], ..]`` with a constant list by a slice."""
    source, entries = node.args
    places = [axis for axis, entry in enumerate(entries) if isinstance(entry, fx.Node)]
    if len(places) != 1:
        return
    axis, entry = places[0], entries[places[0]]
    index = _constant_integers(entry, graph_module) if isinstance(entry, fx.Node) else []
    size = source.meta["val"].shape[axis]
    if not index or not isinstance(size, int):
        return
    first = index[0] % size
    if [i % size for i in index] == list(range(first, first + len(index))):
        node.target, node.args = aten.slice.Tensor, (source, axis, first, first + len(index))


def _constant_integers(node: fx.Node, graph_module: fx.GraphModule) -> list[int]:
    """The integers of a constant vector that was lifted out of the code; empty if ``node`` is anything else."""
    while node.target in (aten.lift_fresh_copy.default, aten.detach_.default) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return []
    value = get_tensor(graph_module, str(node.target))
    usable = not isinstance(value, torch.nn.Parameter) and not value.is_meta and value.dim() == 1
    return [int(i) for i in value] if usable and value.dtype == torch.int64 else []


def _out_of_place(node: fx.Node) -> Any:
    """The out-of-place variant of an in-place op of ATen that is called on a node; None for any other node."""
    name = node.target.name() if isinstance(node.target, OpOverload) else ""
    operation, _, overload = name.removeprefix("aten::").partition(".")
    if not name.startswith("aten::") or not operation.endswith("_") or operation.startswith("__"):
        return None
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return getattr(getattr(aten, operation.removesuffix("_"), None), overload or "default", None)


def _insert_copy(source: fx.Node, before: fx.Node) -> fx.Node:
    with source.graph.inserting_before(before):
        copied = source.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copied.meta = dict(source.meta)
    return copied


def _is_unshared(value: Any, user: fx.Node, writer: fx.Node) -> bool:
    """Whether only ``user`` can see the write of ``writer`` to the node ``value``: all other uses come before it."""
    if any(other is not user and (other > writer or may_alias(other)) for other in value.users):
        return False
    source = value.args[0] if value.args else None
    if value.target is operator.getitem and isinstance(source, fx.Node):
        return isinstance(source.target, OpOverload) and not may_alias(source)
    if not isinstance(value.target, OpOverload):
        return False
    return not may_alias(value) or (isinstance(source, fx.Node) and _is_unshared(source, value, writer))
