"""Kinds of units, and how they are spelled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import one_of, refuse
from fxprune.pipeline.words import EXACT, KINDS, Kind

__all__ = ["DEFAULT_KINDS", "EXACT", "KINDS", "Kind", "as_kinds", "bare_kind"]

DEFAULT_KINDS = ("mlp", "head")
"""What goes unless the caller says otherwise: the kinds of the paper, which every language model has."""


def as_kinds(kinds: str | Sequence[str], name: str = "kinds") -> tuple[str, ...]:
    """Return ``kinds``, an argument called ``name``, as a tuple; a single kind may stand alone.

    ``exact-`` in front of one leaves out its groups that a norm runs over.

    Raises:
        UnknownNameError: no such kind; the nearest is suggested.
        ArgumentError: no kinds at all, or something else.
    """
    given: Any = kinds
    if not isinstance(given, Collection) or isinstance(given, bytes):
        raise refuse(name, kinds, f"one or more of {', '.join(KINDS)}")
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not named:
        raise ArgumentError(f"{name} is empty", where=name, remedy=f"Name one or more of {', '.join(KINDS)}")
    return tuple(_as_kind(kind) for kind in named)


def _as_kind(kind: Any) -> str:
    """Return ``kind`` as it was spelled; no norm runs over a layer, which is the same with the prefix or without."""
    bare = one_of("kind", bare_kind(kind), KINDS)
    return bare if bare == "layer" else str(kind)


def bare_kind(kind: Any) -> Any:
    """Return the kind meant, whether or not all its groups are: ``mlp`` of ``exact-mlp``."""
    return kind.removeprefix(EXACT) if isinstance(kind, str) else kind
