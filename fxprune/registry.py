"""Passes by name, through the entry points of the group ``fxprune.passes``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxprune.errors import UnknownNameError
from fxprune.passbase import Pass

__all__ = ["load_pass", "pass_names"]

_GROUP = "fxprune.passes"


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def pass_names(stage: str | None = None) -> tuple[str, ...]:
    """Names of all installed passes, or of those of one stage, such as ``"importance"``."""
    names = sorted(_entries())
    return tuple(name for name in names if stage is None or _entries()[name].load().stage == stage)


def load_pass(name: str, **arguments: Any) -> Pass:
    """The pass registered as ``name``, made with ``arguments``.

    Raises:
        UnknownNameError: no such pass, or it does not take one of the arguments.
    """
    if name not in _entries():
        raise UnknownNameError("pass", name, _entries())
    made = _entries()[name].load()
    fields = getattr(made, "__dataclass_fields__", {})
    for argument in arguments:
        if argument not in fields:
            raise UnknownNameError(f"argument of pass {name}", argument, fields)
    loaded = made(**arguments)
    assert isinstance(loaded, Pass)
    return loaded
