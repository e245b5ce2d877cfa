"""What an export that is under way can be asked and told."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.fx import GraphModule, Node, Proxy

from fxprune.graph.compat import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot, track_tensor

__all__ = [
    "as_exported",
    "compiled_later",
    "current_tracer",
    "lean",
    "node_of",
    "tidy_later",
    "track",
    "unseen",
    "untraced",
    "without_fast_path",
]


@contextmanager
def as_exported() -> Iterator[None]:
    """Let code that asks whether it is exported find that it is."""
    before = {name: getattr(torch.compiler, name) for name in ("_is_compiling_flag", "_is_exporting_flag")}
    try:
        for name in before:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


@contextmanager
def compiled_later() -> Iterator[WeakSet[GraphModule]]:
    """Write the Python code of graphs that are made in this context once they are run, if they ever are.

    Yields those whose code may not be written yet.
    """
    recompile = GraphModule.recompile
    waiting = WeakSet[GraphModule]()

    def later(graph_module: GraphModule) -> None:
        waiting.add(graph_module)
        kind: Any = type(graph_module)

        def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
            recompile(self)
            return kind.forward(self, *args, **kwargs)

        kind.forward = forward

    GraphModule.recompile = later  # type: ignore[method-assign,assignment]
    try:
        yield waiting
    finally:
        GraphModule.recompile = recompile  # type: ignore[method-assign]


def current_tracer() -> Any:
    """Return the tracer of the export that is under way; None where there is none."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def node_of(tensor: torch.Tensor, tracer: Any) -> Node | None:
    """Return the node that stands for ``tensor`` in a trace; None where there is none, or it has known values."""
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


def track(tensor: torch.Tensor, node: Node, tracer: Any) -> None:
    """Let ``node`` stand for ``tensor`` in a trace."""
    track_tensor(tensor, Proxy(node, tracer), constant=None, tracer=tracer)


@contextmanager
def untraced() -> Iterator[None]:
    """Run ops that do not appear in the graph of the export that is under way."""
    with disable_proxy_modes_tracing(), unseen():
        yield


def unseen() -> AbstractContextManager[None]:
    """Return a context in which no mode of torch functions sees calls."""
    return torch._C.DisableTorchFunction()


@contextmanager
def lean() -> Iterator[None]:
    """Trace without what nobody reads: stacks at nodes, and code of graphs."""
    kept = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with compiled_later():
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = kept


@contextmanager
def tidy_later() -> Iterator[None]:
    """Look for garbage when this is over, among what was made here: what there was before is not all looked through."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
            gc.collect(0)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Make attention modules of torch trace to many small ops, not to one op for a whole block."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
