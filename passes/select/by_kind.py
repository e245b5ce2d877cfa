"""Arguments that are one number for all kinds of structures, or a number for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fxprune.discovery.groups import as_kinds, bare_kind
from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import refuse

__all__ = ["as_pairs", "of_kind", "read_by_kind"]

T = TypeVar("T", int, float)


def read_by_kind(name: str, value: Any, read: Callable[[str, Any], T]) -> T | tuple[tuple[str, T], ...]:
    """Return a number, or pairs of a kind and its number: hashable, and with a spelling as ``[[mlp, 64], [head, 2]]``.

    Args:
        name: of the argument.
        value: a number; or a mapping from kinds to numbers, or pairs of both.
        read: checks one number, given a name for messages and the number.

    Raises:
        UnknownNameError: no such kind.
        ArgumentError: a kind comes twice, or it is something else.
    """
    if not isinstance(value, Mapping | tuple | list):
        return read(name, value)
    items = list(value.items() if isinstance(value, Mapping) else value)
    if not items or not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise refuse(name, value, "a number, or numbers by kind as in {'mlp': .., 'head': ..}")
    pairs = tuple((as_kinds([kind])[0], read(f"{name}[{kind!r}]", number)) for kind, number in items)
    if len({bare_kind(kind) for kind, _ in pairs}) < len(pairs):
        raise ArgumentError("a kind comes twice", where=name, remedy="Give one number for each kind")
    return pairs


def as_pairs(value: T | tuple[tuple[str, T], ...]) -> dict[str, T] | None:
    """Return the numbers by kind; None where there is one for all."""
    return dict(value) if isinstance(value, tuple) else None


def of_kind(value: T | tuple[tuple[str, T], ...], kind: str, default: T) -> T:
    """Return the number for ``kind``, ``default`` where kinds have numbers and this one has none."""
    return {bare_kind(key): number for key, number in value}.get(kind, default) if isinstance(value, tuple) else value
