"""Attempts at running code that is not ours: what it raises is an answer, what we raise is a defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Refusal", "attempt", "call_foreign"]

T = TypeVar("T")

_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Refusal:
    """Why code that is not ours did not do what it was asked.

    Args:
        error: what it raised.
    """

    error: Exception

    def __str__(self) -> str:
        """Return the kind of error and the first line of its message."""
        lines = str(self.error).splitlines()
        return f"{type(self.error).__name__}: {lines[0] if lines else ''}"


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
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code is call_foreign.__code__:
        return False
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == _OURS
