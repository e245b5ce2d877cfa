"""Progress of what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fxprune.pipeline.arguments import function

__all__ = ["Track", "check_track", "no_progress"]

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Yields what it is given and shows how far it is: ``track(items, what, total)``."""


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return ``items`` as they are; nothing is shown."""
    return items


def check_track(track: Any) -> None:
    """Raise :class:`~fxprune.errors.ArgumentError` unless ``track`` can be called."""
    function("track", track, "a function that is called as track(items, what, total) and yields the items")
