"""Keep warnings and logs of other packages quiet for a while."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Hide warnings, and log messages up to ``level``, while the context lasts.

    Args:
        level: the highest level that is hidden. What another ``quiet`` around this one hides stays hidden.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
