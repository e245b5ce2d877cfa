"""Contexts around foreign code: output silenced, torch state restored, errors classified, export settings."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import signal
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node, Proxy

from fxprune.errors import FxpruneError
from fxprune.graph.compat import (
    clear_symbolic_caches,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor,
)


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Hide warnings and log messages up to ``level``, and from ``ERROR`` on also standard error.

    An outer ``quiet`` with a higher level stays in force.
    """
    before = logging.root.manager.disable
    wanted = max(before, level)
    try:
        if wanted != before:  # logging.disable clears the caches of all loggers
            logging.disable(wanted)
        with warnings.catch_warnings(), silence_stderr() if level >= logging.ERROR else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        if logging.root.manager.disable != before:
            logging.disable(before)


def silence_stderr() -> AbstractContextManager[object]:
    """Discard output to ``sys.stderr``: torch prints a whole graph there before it raises."""
    return redirect_stderr(io.StringIO())


_TURN = threading.RLock()
"""What torch patches and records while it traces belongs to the process: threads take turns."""


@contextmanager
def default_modes() -> Iterator[None]:
    """Restore torch's default modes: gradients on, no autocast, no inference mode, the CPU as default device.

    A call then does the same inside a user's ``torch.inference_mode()``, ``torch.no_grad()``, ``torch.autocast`` or
    ``torch.device``. Compiled code runs eagerly, and torch caches nothing about symbolic sizes beyond the call. Threads
    are in it one at a time. Also a decorator.
    """
    with _TURN, ExitStack() as stack:
        stack.enter_context(clear_symbolic_caches())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # an active device context slows down every call of torch
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, on all devices, at the end of the context."""
    python, numbers = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator()
    kind = "cuda" if device is None else device.type
    has_state = hasattr(torch.get_device_module(kind), "get_rng_state")  # a backend from elsewhere may have none
    count = torch.accelerator.device_count() if has_state else 0
    try:
        with torch.random.fork_rng(range(count), device_type=kind if has_state else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each of its modules at the end."""
    held = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in held:
            module.training = training


T = TypeVar("T")


@contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Give a context variable a value inside this context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_LONGEST = 300
"""Characters to repeat of a foreign message; some go on for pages."""


@dataclass(frozen=True)
class Refusal:
    """A foreign function's refusal: the exception it raised."""

    error: Exception

    def __str__(self) -> str:
        line = next((line.strip() for line in str(self.error).splitlines() if line.strip()), "")
        shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST].rstrip()} ..."
        return f"{type(self.error).__name__}: {shown}"


@contextmanager
def wrap_errors(where: str, remedy: str, kind: type[FxpruneError] = FxpruneError) -> Iterator[None]:
    """Turn foreign exceptions into errors of this package, with the exception as cause; also a decorator.

    Interrupts and out-of-memory errors pass as they are. ``remedy`` is for the case that foreign code refused.
    """
    try:
        yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever it is, the caller gets the place and a remedy
        place = _own_place(error)
        if not place:
            raise kind(str(Refusal(error)), where=where, remedy=remedy) from error
        raise kind(f"{Refusal(error)} ({place})", where=where, remedy=f"{remedy}. {_DEFECT}") from error


_DEFECT = "If they are as documented, this is a defect of fxprune: please report it with the traceback of the cause"


def attempt(
    function: Callable[..., T], /, *args: Any, refusals: tuple[type[Exception], ...] = (), **kwargs: Any
) -> T | Refusal:
    """Call a function and return its result, or its :class:`Refusal`.

    An exception counts as a refusal if foreign code raised it: a model's constructor, or the torch or transformers code
    that it called. An exception raised by a line of this package is a defect and propagates, except those of the
    classes ``refusals``, which this package raises to refuse on purpose.
    """
    try:
        return call_foreign(function, *args, **kwargs)
    except refusals as error:
        return Refusal(error)
    except Exception as error:  # foreign code may raise anything; defects of this package propagate
        if _own_place(error):
            raise
        return Refusal(error)


def call_foreign(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call foreign code from this package: arguments it does not take are its refusal, not a defect here."""
    return function(*args, **kwargs)


def _own_place(error: Exception) -> str:
    """The file and line that raised ``error`` if this package did; empty for other code and :func:`call_foreign`."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package != __name__.partition(".")[0] or frame.f_code is call_foreign.__code__:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{line}"


@contextmanager
def replaced(owner: object, **values: Any) -> Iterator[None]:
    """Give attributes of a module or a class other values inside this context."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def mark_exporting() -> AbstractContextManager[None]:
    """Make ``torch.compiler.is_exporting()`` and ``is_compiling()`` true inside this context."""
    return replaced(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=True)


class _ForwardWhenRead:
    """The ``forward`` of a graph module without code, which is generated when it is read, of it or of its class."""

    def __init__(self, graph_module: GraphModule, recompile: Callable[[GraphModule], object]) -> None:
        self.recompile = recompile
        self.only = weakref.ref(graph_module)  # each graph module has a class of its own

    def __get__(self, graph_module: GraphModule | None, kind: Any) -> Any:
        only = self.only()
        if only is None:
            return self
        self.recompile(only)
        return kind.forward if graph_module is None else only.forward


def recompile_lazily() -> AbstractContextManager[None]:
    """Generate the code of graph modules that are made or changed in this context when it is first needed."""
    recompile = GraphModule.recompile

    def postpone(graph_module: GraphModule) -> None:
        kind: Any = type(graph_module)
        kind.forward = _ForwardWhenRead(graph_module, recompile)

    return replaced(GraphModule, recompile=postpone)


def current_tracer() -> Any:
    """Return the tracer of the export in progress, or None."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def node_of(tensor: torch.Tensor, tracer: Any) -> Node | None:
    """Return the node of ``tensor`` in a trace; None if it has none, or is a constant."""
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


def bind_node(tensor: torch.Tensor, node: Node, tracer: Any) -> None:
    """Make ``node`` the node of ``tensor`` in a trace."""
    track_tensor(tensor, Proxy(node, tracer), constant=None, tracer=tracer)


@contextmanager
def pause_tracing() -> Iterator[None]:
    """Run ops without recording them in the export in progress."""
    with disable_proxy_modes_tracing(), disable_torch_function():
        yield


def disable_torch_function() -> AbstractContextManager[None]:
    """Return a context in which torch function modes see no calls."""
    return torch._C.DisableTorchFunction()


@contextmanager
def defer_gc() -> Iterator[None]:
    """Postpone garbage collection to the end of the context, and then search young objects only."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
            gc.collect(0)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM at the end of the context, in the main thread; other threads receive none.

    Python raises in whatever code it runs then: in a callback from C++, as tracing makes many, that ends the process.
    """
    is_main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    held: dict[int, None] = {}
    for number in handlers:
        signal.signal(number, lambda received, _: held.setdefault(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in held:
            signal.raise_signal(received)


@contextmanager
def plain_export() -> Iterator[None]:
    """Export torch's transformer modules as small ops, and without node stack traces and graph code."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with replaced(torch.fx.config, do_not_emit_stack_traces=True), recompile_lazily():
            yield
    finally:
        mha.set_fastpath_enabled(before)
