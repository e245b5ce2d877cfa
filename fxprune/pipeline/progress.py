"""Progress of what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Track", "no_progress"]

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Yields what it is given and shows how far it is: ``track(items, what, total)``."""


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return ``items`` as they are; nothing is shown."""
    return items
