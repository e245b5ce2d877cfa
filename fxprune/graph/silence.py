"""Keep warnings, logs and prints of other packages quiet for a while."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

__all__ = ["quiet", "unprinted"]


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
