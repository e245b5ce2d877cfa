"""One spelling for ops that have several, so that rules and rewrites meet fewer forms.

``view`` becomes ``reshape`` (a narrower inner axis may make its input non-contiguous), ``chunk`` and ``split`` become
``split_with_sizes`` (parts may end up of unequal size), ``unflatten`` becomes ``reshape``, ``-1`` in a shape is
spelled out where the size is known, and attention always has its ``scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["canonicalize"]

aten = torch.ops.aten


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place to its canonical spelling; values do not change."""
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None:
            rewrite(node)


def _reshape(node: fx.Node) -> None:
    node.target = aten.reshape.default
    source, sizes = node.args
    assert isinstance(sizes, list | tuple)
    known = _shape(node)
    spelled = [known[i] if size == -1 and isinstance(known[i], int) else size for i, size in enumerate(sizes)]
    node.args = (source, spelled)


def _split(node: fx.Node) -> None:
    source, _, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (source, sizes, dim), {}


def _unflatten(node: fx.Node) -> None:
    source, dim, sizes = node.args
    assert isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(sizes, list | tuple)
    shape = source.meta["val"].shape
    dim %= len(shape)
    outer: list[Any] = []
    with node.graph.inserting_before(node):
        for axis, size in enumerate(shape):
            if isinstance(size, int) or axis == dim:
                outer.append(size)
                continue
            symbol = node.graph.call_function(aten.sym_size.int, (source, axis))
            symbol.meta["val"] = size
            outer.append(symbol)
    node.args = (source, [*outer[:dim], *sizes, *outer[dim + 1 :]])
    _reshape(node)


def _attention(node: fx.Node) -> None:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    width = query.meta["val"].shape[-1]
    if node.kwargs.get("scale") is None and len(node.args) < 7 and isinstance(width, int):
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(width)}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of the value of ``node``: numbers where static, symbols where not."""
    return tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)


_REWRITES: dict[Any, Callable[[fx.Node], None]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.chunk.default: _split,
    aten.split.Tensor: _split,
    aten.unflatten.int: _unflatten,
    aten.scaled_dot_product_attention.default: _attention,
}
