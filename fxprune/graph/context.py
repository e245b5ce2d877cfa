"""Scopes around code that is not ours: output silenced, torch state restored, errors classified, export settings.

Where a call of the user enters this package, :func:`clear_errors` is the last net: what nobody foresaw still ends in an
error that says where, what and what to do.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node, Proxy

from fxprune.errors import FxpruneError
from fxprune.graph.compat import disable_proxy_modes_tracing, forgetting, get_proxy_mode, get_proxy_slot, track_tensor

__all__ = [
    "Refusal",
    "as_exported",
    "attempt",
    "call_foreign",
    "clear_errors",
    "compiled_later",
    "current_tracer",
    "evaluating",
    "lean",
    "neutral",
    "node_of",
    "own_randomness",
    "quiet",
    "tidy_later",
    "track",
    "unprinted",
    "unseen",
    "untraced",
    "without_fast_path",
]


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Hide warnings, and log messages up to ``level``, while the context lasts.

    Args:
        level: the highest level that is hidden. What another ``quiet`` around this one hides stays hidden. Where errors
            are, what is printed about them is too; see :func:`unprinted`.
    """
    before = logging.root.manager.disable
    _disable(max(before, level))
    try:
        with warnings.catch_warnings(), unprinted() if level >= logging.ERROR else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        _disable(before)


def _disable(level: int) -> None:
    """Hide log messages up to ``level``; if they are hidden already, no logger has to forget what it shows."""
    if logging.root.manager.disable != level:
        logging.disable(level)


@contextmanager
def unprinted() -> Iterator[None]:
    """Hide what is written to ``sys.stderr``: torch prints a whole graph there before it lets an error pass."""
    with redirect_stderr(io.StringIO()):
        yield


_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Those that autocast knows."""


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as outside of any context of torch: with gradients, in the dtypes of the tensors, on the CPU by default.

    So a call does the same under ``torch.inference_mode()``, ``torch.no_grad()``, ``torch.autocast`` and
    ``torch.device`` as without. Code that was compiled runs as it was written, and torch remembers nothing of the call.
    Also as a decorator.
    """
    with ExitStack() as stack:
        stack.enter_context(forgetting())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # each context in force costs every call of torch some time
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch, on all devices, as they were before the context."""
    python, numbers = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator()
    kind = "cuda" if device is None else device.type
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context lasts; each of its modules is then as it was."""
    held = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in held:
            module.training = training


T = TypeVar("T")

_OURS = __name__.partition(".")[0]

_LONGEST = 300
"""Characters of a stranger's message that are repeated; some go on for pages."""


@dataclass(frozen=True)
class Refusal:
    """Why code that is not ours did not do what it was asked.

    Args:
        error: what it raised.
    """

    error: Exception

    def __str__(self) -> str:
        """Return the kind of error and the first line of its message."""
        line = next((line.strip() for line in str(self.error).splitlines() if line.strip()), "")
        shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST].rstrip()} ..."
        return f"{type(self.error).__name__}: {shown}"


@contextmanager
def clear_errors(where: str, remedy: str, kind: type[FxpruneError] = FxpruneError) -> Iterator[None]:
    """Turn whatever is raised, and is not an error of this package, into one; also as a decorator.

    Interrupts, and memory that ran out, pass as they are.

    Args:
        where: the argument, pass or function concerned.
        remedy: what the caller can do where code that is not ours refused.
        kind: the class of the error.

    Raises:
        FxpruneError: of the class ``kind``, with what was raised as its cause.
    """
    try:
        yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the last net: whatever it is, the caller is told where it happened and what to do
        frame = _innermost(error.__traceback__)
        if frame is None or not _is_ours(error.__traceback__):
            raise kind(str(Refusal(error)), where=where, remedy=remedy) from error
        place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}"
        raise kind(f"{Refusal(error)} ({place})", where=where, remedy=f"{remedy}. {_DEFECT}") from error


_DEFECT = "If they are as documented, this is a defect of fxprune: please report it with the traceback of the cause"


def attempt(
    function: Callable[..., T], /, *args: Any, refusals: tuple[type[Exception], ...] = (), **kwargs: Any
) -> T | Refusal:
    """Return what a function returns, or why it refused.

    An error counts as a refusal if the code that raised it is not ours: a stranger's constructor, or the torch or
    transformers code that it called. An error raised by a line of this package is a defect and is raised again.

    Args:
        function: runs code that is not ours, perhaps by way of ours.
        args: what it is called with.
        refusals: errors that our own code raises to refuse on purpose.
        kwargs: what it is called with by name.
    """
    try:
        return call_foreign(function, *args, **kwargs)
    except refusals as error:
        return Refusal(error)
    except Exception as error:  # code that is not ours may raise anything; errors of our own pass on
        if _is_ours(error.__traceback__):
            raise
        return Refusal(error)


def call_foreign(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call code that is not ours from code that is: arguments it does not take are its refusal, not our defect."""
    return function(*args, **kwargs)


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame of a traceback is in this package, and not where a stranger's call was refused."""
    last = _innermost(traceback)
    if last is None or last.tb_frame.f_code is call_foreign.__code__:
        return False
    return str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == _OURS


def _innermost(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


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
