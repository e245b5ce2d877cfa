"""Attempts at running code that is not ours: what it raises is an answer, what we raise is a defect.

Where a call of the user enters this package, :func:`clear_errors` is the last net: what nobody foresaw still ends in an
error that says where, what and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from fxprune.errors import FxpruneError

__all__ = ["Refusal", "attempt", "call_foreign", "clear_errors"]

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
