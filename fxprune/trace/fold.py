"""Constants whose entries depend on their position become buffers, so that they are sliced like any other weight.

``2 ** -arange(heads)`` has a value of its own for each head: making it again with fewer heads gives other numbers. What
depends on no input, no weight and no dynamic size is therefore worked out once, and the graph reads the result. A
constant that is the same everywhere is left alone: it takes the size of whatever it is used with.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.compat import OpOverload, is_random, tree_leaves
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.rules.aliasing import alias_roots, writes

__all__ = ["MOST_ELEMENTS", "fold_constants", "place_constants"]

aten = torch.ops.aten

MOST_ELEMENTS = 1 << 20
"""Larger values are made anew by the graph each time: 4 MiB in float32, so that no mask of a long context is kept."""


def fold_constants(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Numbered constants of static size are buffers of ``graph_module`` named ``constant_0``, ``constant_1``, ..

    Args:
        graph_module: the graph, changed in place.
        model: the module it was traced from. Its own tensors are no constants: someone may load others into it.
    """
    constant = _constant_nodes(graph_module, model)
    values = _Values(graph_module, constant)
    names = (name for i in itertools.count() if not hasattr(model, name := f"constant_{i}"))
    for node in constant:
        if node.op == "get_attr" or all(user in constant for user in node.users):
            continue
        value = values.of(node)
        if isinstance(value, torch.Tensor) and _is_numbered(value):
            name = next(names)
            graph_module.register_buffer(name, value)
            _read_instead(node, name, value, values.own)


def place_constants(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """What is no tensor of ``model`` is on its device."""
    device = next(model.parameters()).device
    for name, value in weights(graph_module):
        if value.device != device and not _has(model, name):
            set_tensor(graph_module, name, value.to(device))


def _constant_nodes(graph_module: fx.GraphModule, model: nn.Module) -> dict[fx.Node, None]:
    """The nodes whose value is the same at every run, in order; what is written to in place is not among them."""
    environment = {node for node in graph_module.graph.nodes if node.target is getattr}
    written = _written(graph_module.graph)
    found: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            known = not _has(model, str(node.target))
        else:
            known = _is_plain(node) and all(n in found or n in environment for n in node.all_input_nodes)
        if known and node not in written and _is_small(node.meta.get("val")):
            found[node] = None
    return found


def _has(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(owner), leaf)
    except AttributeError:
        return False


def _is_plain(node: fx.Node) -> bool:
    """Whether ``node`` calls an op that always does the same."""
    if node.target is operator.getitem:
        return True
    plain = isinstance(node.target, OpOverload) and not node.target._schema.is_mutable
    return plain and not is_random(node.target)


def _is_small(value: Any) -> bool:
    """Whether ``value`` is one tensor or several, of known sizes that are not too large."""
    leaves = tree_leaves(value)
    sizes = [leaf.numel() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    return bool(sizes) and all(isinstance(size, int) and size <= MOST_ELEMENTS for size in sizes)


def _is_numbered(value: torch.Tensor) -> bool:
    return value.numel() > 1 and not bool((value == value.reshape(-1)[0]).all())


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory some op writes to, itself or through another value."""
    root = alias_roots(graph)
    dirty = {root[node] for node in root if writes(node)}
    return {node for node in root if root[node] in dirty}


class _Values:
    """The values of constant nodes, worked out as they are asked for, on the CPU.

    What has the dtype of the model has at least float32 here, and is cast when it is read.
    """

    def __init__(self, graph_module: fx.GraphModule, constant: Mapping[fx.Node, None]) -> None:
        self.graph_module = graph_module
        self.constant = constant
        self.known: dict[fx.Node, Any] = {}
        self.own = next((n for n in graph_module.graph.nodes if n.target is getattr and n.args[1] == "dtype"), None)
        self.dtype = self._widest()

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``."""
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return get_tensor(self.graph_module, str(node.target)).cpu()
        if node not in self.constant:
            return self.dtype if node is self.own else torch.device("cpu")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _widest(self) -> torch.dtype:
        source = None if self.own is None else self.own.args[0]
        if not isinstance(source, fx.Node):
            return torch.float32
        return torch.promote_types(get_tensor(self.graph_module, str(source.target)).dtype, torch.float32)


def _read_instead(node: fx.Node, name: str, value: torch.Tensor, own: fx.Node | None) -> None:
    """Every use of ``node`` reads the buffer ``name``, in the dtype that ``node`` has."""
    fake = node.meta["val"]
    with node.graph.inserting_before(node):
        read = node.graph.create_node("get_attr", name, name=name)
        read.meta = {**node.meta, "val": fake.to(value.dtype)}
        new = read
        if fake.dtype != value.dtype:
            new = node.graph.call_function(aten.to.dtype, (read, own))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
