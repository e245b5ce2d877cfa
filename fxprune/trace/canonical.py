"""One spelling for ops that have several, so that rules and rewrites meet fewer forms.

``view`` becomes ``reshape`` (a narrower inner axis may make its input non-contiguous), ``chunk`` and ``split`` become
``split_with_sizes`` (parts may end up of unequal size), ``unflatten`` and ``view_as`` become ``reshape``, ``-1`` in a
shape is spelled out where the size is known, a slice (which ``narrow`` becomes) counts its bounds from the front,
attention always has its ``scale``, a constant list of consecutive indices becomes a ``slice``, what is viewed as
complex numbers is copied first, ``squeeze`` names its axes, and an in-place op on a value that nothing else can see
becomes the plain one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import OpOverload, is_impure
from fxprune.graph.tensors import get_tensor
from fxprune.rules.aliasing import may_alias, regroups
from fxprune.rules.spelling import find_spelling, spelling

__all__ = ["canonicalize", "plain_in_place"]

aten = torch.ops.aten


def canonicalize(graph_module: fx.GraphModule) -> None:
    """Rewrite the graph in place to its canonical spelling; values do not change."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        respell = find_spelling(node.target) if node.op == "call_function" else None
        if respell is not None:
            respell(node, graph_module)


def plain_in_place(graph_module: fx.GraphModule) -> None:
    """In-place ops on values that nothing else can see are plain ones; values do not change.

    What the others write to through a view is laid out such that the view stays one whatever its sizes.
    """
    for node in list(graph_module.graph.nodes):
        _plain(node)
        if is_impure(node) and node.op == "call_function" and isinstance(node.args[0], fx.Node):
            _lay_out(node.args[0])


@spelling("view", "reshape", "_unsafe_view")
def _reshape(node: fx.Node, graph_module: fx.GraphModule) -> None:
    node.target = aten.reshape.default
    source, sizes = node.args
    assert isinstance(sizes, list | tuple)
    known = _shape(node)
    spelled = [known[i] if size == -1 and isinstance(known[i], int) else size for i, size in enumerate(sizes)]
    node.args = (source, spelled)


@spelling("chunk", "split.Tensor")
def _split(node: fx.Node, graph_module: fx.GraphModule) -> None:
    source, _, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (source, sizes, dim), {}


@spelling("slice.Tensor")
def _slice(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Bounds counted from the end are counted from the front: only what comes before may then move them."""
    source, *rest = node.args
    assert isinstance(source, fx.Node)
    dim = rest[0] if rest else 0
    assert isinstance(dim, int)
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        bounds = [max(bound + size, 0) if isinstance(bound, int) and bound < 0 else bound for bound in rest[1:3]]
        node.args = (source, dim, *bounds, *rest[3:])


@spelling("narrow")
def _narrow(node: fx.Node, graph_module: fx.GraphModule) -> None:
    source, dim, start, length = node.args
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    size = source.meta["val"].shape[dim]
    if isinstance(start, int) and isinstance(length, int) and isinstance(size, int):
        first = start + size if start < 0 else start
        node.target, node.args = aten.slice.Tensor, (source, dim, first, first + length)


@spelling("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The axes of size 1 are named, so that one that has a single unit left stays."""
    source, *dims = node.args
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    named = range(len(shape)) if not dims else dims[0] if isinstance(dims[0], list | tuple) else dims
    found = [i % len(shape) for i in named if isinstance(i, int)] if shape else []
    node.target, node.args = (
        aten.squeeze.dims,
        (source, [i for i in found if isinstance(shape[i], int) and shape[i] == 1]),
    )


@spelling("unflatten.int")
def _unflatten(node: fx.Node, graph_module: fx.GraphModule) -> None:
    source, dim, sizes = node.args
    assert isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(sizes, list | tuple)
    shape = source.meta["val"].shape
    dim %= len(shape)
    outer = _sizes(source, node, but=dim)
    node.args = (source, [*outer[:dim], *sizes, *outer[dim + 1 :]])
    _reshape(node, graph_module)


@spelling("reshape_as", "view_as")
def _reshape_as(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The shape of another tensor is some numbers: what its axes are made of does not matter."""
    source, other = node.args
    assert isinstance(other, fx.Node)
    node.args = (source, _sizes(other, node))
    _reshape(node, graph_module)


def _sizes(source: fx.Node, before: fx.Node, but: int | None = None) -> list[Any]:
    """The sizes of ``source``, numbers where static and else nodes that read them, put ``before`` a node."""
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


@spelling("scaled_dot_product_attention")
def _attention(node: fx.Node, graph_module: fx.GraphModule) -> None:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    width = query.meta["val"].shape[-1]
    if node.kwargs.get("scale") is None and len(node.args) < 7 and isinstance(width, int):
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(width)}


@spelling("view_as_complex")
def _view_as_complex(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Pairs must lie on even places, which those of a slice may no longer do: a copy of its own has them there."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.args = (_copied(source, node),)


@spelling("index.Tensor")
def _index(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """``x[.., [i, i + 1, ..], ..]`` with a constant list is a slice."""
    source, entries = node.args
    assert isinstance(source, fx.Node) and isinstance(entries, list | tuple)
    places = [axis for axis, entry in enumerate(entries) if isinstance(entry, fx.Node)]
    if len(places) != 1:
        return
    axis, entry = places[0], entries[places[0]]
    index = _constant(entry, graph_module) if isinstance(entry, fx.Node) else []
    size = source.meta["val"].shape[axis]
    if not index or not isinstance(size, int):
        return
    first = index[0] % size
    if [i % size for i in index] == list(range(first, first + len(index))):
        node.target, node.args = aten.slice.Tensor, (source, axis, first, first + len(index))


def _constant(node: fx.Node, graph_module: fx.GraphModule) -> list[int]:
    """The integers of a constant vector that was lifted out of the code; empty if ``node`` is no such thing."""
    while node.target in (aten.lift_fresh_copy.default, aten.detach_.default) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return []
    value = get_tensor(graph_module, str(node.target))
    usable = not isinstance(value, torch.nn.Parameter) and not value.is_meta and value.dim() == 1
    return [int(i) for i in value] if usable and value.dtype == torch.int64 else []


def _plain(node: fx.Node) -> None:
    """``x.add_(y)`` is ``x.add(y)`` where ``x`` is a fresh value that is not used again."""
    name = node.target.name() if isinstance(node.target, OpOverload) else ""
    operation, _, overload = name.removeprefix("aten::").partition(".")
    if not name.startswith("aten::") or not operation.endswith("_") or operation.startswith("__"):
        return
    packet = getattr(aten, operation.removesuffix("_"), None)
    target = getattr(packet, overload or "default", None)
    if target is not None and node.args and isinstance(node.args[0], fx.Node) and _is_fresh(node.args[0], node, node):
        node.target = target


def _lay_out(written: fx.Node) -> None:
    """What ``written`` is a view of, by way of another shape, is contiguous from the start.

    A reshape of anything else may be a copy once sizes have changed, and what is written to that would be lost.
    """
    root, reshaped = written, False
    while may_alias(root) and isinstance(root.args[0], fx.Node):
        reshaped = reshaped or regroups(root)
        root = root.args[0]
    if reshaped and root.op == "call_function":
        contiguous = _copied(root, root.next)
        root.replace_all_uses_with(contiguous, delete_user_cb=lambda user: user is not contiguous)


def _copied(source: fx.Node, before: fx.Node) -> fx.Node:
    """A contiguous copy of ``source``, put ``before`` a node."""
    with source.graph.inserting_before(before):
        copied = source.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copied.meta = dict(source.meta)
    return copied


def _is_fresh(value: fx.Node, user: fx.Node, writer: fx.Node) -> bool:
    """Whether only its one ``user`` can see what ``writer`` writes to ``value``: all others are done by then."""
    if any(other is not user and (other > writer or may_alias(other)) for other in value.users):
        return False
    source = value.args[0] if value.args else None
    if value.target is operator.getitem and isinstance(source, fx.Node):
        return isinstance(source.target, OpOverload) and not may_alias(source)
    if not isinstance(value.target, OpOverload):
        return False
    return not may_alias(value) or (isinstance(source, fx.Node) and _is_fresh(source, value, writer))


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of the value of ``node``: numbers where static, symbols where not."""
    return tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)
