"""Regions of a traced program that run in a mode: what the mode does is written into the graph, and the region goes.

Without gradients, what is computed cannot be differentiated: where the rest of the graph reads it, it is detached.
Under autocast, ops take some of their inputs in another dtype: they get them cast.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import (
    AUTOCAST,
    GRADIENTS,
    HigherOrderOperator,
    TorchDispatchMode,
    has_unbacked_sizes,
    is_check,
    is_size,
    tree_leaves,
)
from fxprune.graph.names import base_name

__all__ = ["copy_body"]

aten = torch.ops.aten
Env = dict[fx.Node, Any]
Autocast = tuple[str, torch.dtype]


def copy_body(source: fx.GraphModule, graph: fx.Graph, env: Env, device: str) -> list[Any]:
    """Copy the operations of a program into ``graph``; return what it returns, in terms of the new nodes.

    Args:
        source: the graph module of an exported program.
        graph: where to.
        env: the new node for each placeholder of ``source``; filled with the other nodes.
        device: the type of the device that the model runs on.
    """
    copier = _Copier(graph, device)
    copier.copy(source, env)
    return [copier.read(env[value], True) if isinstance(value, fx.Node) else value for value in _results(source)]


class _Copier:
    """Copies regions inside regions; knows which values have no gradient."""

    def __init__(self, graph: fx.Graph, device: str) -> None:
        self.graph = graph
        self.device = device
        self.stopped: dict[fx.Node, fx.Node | None] = {}
        self.sizes: dict[object, fx.Node] = {}

    def copy(self, source: fx.GraphModule, env: Env, grad: bool = True, autocast: Autocast | None = None) -> None:
        """Copy the body of ``source``, which runs with or without gradients, under autocast or not."""
        for node in source.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or is_check(node):
                continue
            if isinstance(node.target, HigherOrderOperator) and node.target.name() in (GRADIENTS, AUTOCAST):
                env[node] = self._region(node, source, env, grad, autocast)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple | list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                known = self.sizes.get(_size_of(node))
                casts = {} if autocast is None or known is not None else _casts(node, *autocast)
                env[node] = new = known or self._node(node, env, grad, casts)
                self.sizes.setdefault(_size_of(node), new)

    def read(self, value: Any, grad: bool) -> Any:
        """Return ``value`` as it is seen where there are gradients or not."""
        if not grad or not isinstance(value, fx.Node) or value not in self.stopped:
            return value
        found = self.stopped[value]
        if found is None:
            with self.graph.inserting_after(value):
                found = self.graph.call_function(aten.detach.default, (value,))
            found.meta = dict(value.meta)
            self.stopped[value] = found
        return found

    def _node(self, node: fx.Node, env: Env, grad: bool, casts: Mapping[fx.Node, torch.dtype]) -> fx.Node:
        """Copy one op; those of its inputs that ``casts`` names are cast before it.

        Ops of a name are numbered anew: what torch worked out for nothing while it traced left gaps.
        """

        def argument(old: fx.Node) -> Any:
            value = self.read(env[old], grad)
            if old not in casts:
                return value
            cast = self.graph.call_function(aten.to.dtype, (value, casts[old]))
            cast.meta = {**old.meta, "val": old.meta["val"].to(casts[old])}
            return cast

        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=base_name(node), type_expr=node.type)
        new.meta = dict(node.meta)
        if not grad and isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point():
            self.stopped[new] = None
        return new

    def _region(self, region: fx.Node, source: fx.GraphModule, env: Env, grad: bool, autocast: Autocast | None) -> Any:
        """Copy what is in a region; return what it returned."""
        position = next(i for i, arg in enumerate(region.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        mode, inner = region.args[:position], getattr(source, str(region.args[position].target))  # type: ignore[union-attr]
        values = [env[value] if isinstance(value, fx.Node) else value for value in region.args[position + 1 :]]
        inputs = [node for node in inner.graph.nodes if node.op == "placeholder"]
        below: Env = dict(zip(inputs, values, strict=True))
        if isinstance(region.target, HigherOrderOperator) and region.target.name() == GRADIENTS:
            grad = bool(mode[0])
        elif mode[0] == self.device:
            autocast = (_TRACED_ON, mode[1]) if mode[2] else None  # type: ignore[assignment]
        self.copy(inner, below, grad, autocast)
        return fx.map_arg(_results(inner), lambda old: below[old])


_TRACED_ON = "cpu"
"""Where the tensors of a trace are, whatever the device of the model."""


def _size_of(node: fx.Node) -> object:
    """Return what ``node`` works out of sizes, of which the graph needs one node only; itself if that is no size."""
    if not is_size(node) or has_unbacked_sizes(node.meta["val"]):
        return node
    return type(node.meta["val"]), node.meta["val"].node.expr


def _results(source: fx.GraphModule) -> Any:
    return source.graph.output_node().args[0]


def _casts(node: fx.Node, device: str, dtype: torch.dtype) -> dict[fx.Node, torch.dtype]:
    """Return the dtype in which ``node`` takes those of its inputs that autocast casts: it is run without storage."""
    sources = {id(source.meta["val"]): source for source in node.all_input_nodes if "val" in source.meta}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    fake = next((leaf.fake_mode for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "fake_mode")), None)
    if fake is None or not callable(node.target):
        return {}
    with fake, torch.autocast(device, dtype, cache_enabled=False), _SeenCasts(sources) as seen:
        node.target(*args, **kwargs)
    found: dict[fx.Node, torch.dtype] = seen.casts
    return found


class _SeenCasts(TorchDispatchMode):
    """Notes which of some tensors are cast, and to what."""

    def __init__(self, sources: Mapping[int, fx.Node]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.casts: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._to_copy.default and id(args[0]) in self.sources and (kwargs or {}).get("dtype"):
            self.casts[self.sources[id(args[0])]] = kwargs["dtype"]
        return func(*args, **(kwargs or {}))
