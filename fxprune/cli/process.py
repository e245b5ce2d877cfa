"""The process of a command: signals that stop it, and its memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["exit_on_signal", "finish", "install", "keep_freed"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PATIENCE = 5.0
"""Seconds for which further signals wait for the cleanup that the first one started."""

_state = {"exits": False, "since": 0.0, "swallowed": False}


def install() -> None:
    """Let Ctrl-C end the process with exit code 130, and SIGTERM with 143.

    Temporary files and folders are removed on the way out, so that a result is there as a whole or not at all.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # shells let background jobs ignore interrupts
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable


def finish() -> None:
    """Ignore signals from here on: a command whose work is done ends with its own exit code."""
    if not _state["since"]:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit without cleanup on a signal inside this context, for imports: C code swallows exceptions raised in them."""
    _state["exits"] = True
    try:
        yield
    finally:
        _state["exits"] = False


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Send the signal again if it arrived in a finaliser or a weakref callback, where nothing can be raised."""
    if not _state["since"] or not isinstance(found.exc_value, SystemExit):
        sys.__unraisablehook__(found)
        return
    _state["swallowed"] = True
    number = int(str(found.exc_value)) - 128
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _stop(number: int, frame: FrameType | None) -> None:
    if _state["swallowed"]:
        _state["swallowed"] = False
        raise SystemExit(128 + number)
    now = time.monotonic()
    if _state["since"] and now - _state["since"] < _PATIENCE:
        return
    first, _state["since"] = not _state["since"], now
    if first:
        # not by a stream of Python, which may be in the middle of a write and cannot be entered twice
        os.write(2, b"\r\x1b[Kstopped\n" if sys.__stderr__ is not None and sys.__stderr__.isatty() else b"stopped\n")
    if _state["exits"] or not first:
        os._exit(128 + number)
    raise SystemExit(128 + number)


def keep_freed() -> bool:
    """Disable trimming in glibc's malloc; False on other allocators.

    By default each tensor above 32 MB, such as the logits of some hundred tokens, is a mapping of its own, which the
    system fills with zeros page by page: up to a quarter of the time of a training step on a CPU. Only for a process
    that has memory to spare and does little else.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # options of mallopt, from malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))  # no mappings, and a heap that never shrinks
