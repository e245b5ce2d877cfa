"""Ops that have several spellings, and what writes one of them for all."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxprune.graph.compat import OpOverload

__all__ = ["Respell", "find_spelling", "spelling"]

Respell = Callable[[fx.Node, fx.GraphModule], None]
"""Changes a node, and what is before it, in place; values do not change."""

_SPELLINGS: dict[str, Respell] = {}


def spelling(*names: str) -> Callable[[Respell], Respell]:
    """Respell the ops ``names`` with the decorated function.

    Args:
        names: ops with their overload (``"slice.Tensor"``; ``"view"`` for the default one), of ATen unless they say.
    """

    def decorate(function: Respell) -> Respell:
        for name in names:
            _SPELLINGS[name if "::" in name else f"aten::{name}"] = function
        return function

    return decorate


def find_spelling(target: object) -> Respell | None:
    """What respells an op, if it has another spelling."""
    return _SPELLINGS.get(target.name()) if isinstance(target, OpOverload) else None
