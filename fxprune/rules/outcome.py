"""What an elementwise op makes of certain numbers, found out by calling it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import size_hint, tree_leaves

__all__ = ["drawn", "outcome"]

_DRAWS = 32
"""Numbers that stand for anything: enough to hold both signs, small and large ones, and both truth values for sure."""


@dataclass(frozen=True)
class _Stand:
    """What stands for a node among the arguments of an op: a tensor that holds a number or any numbers."""

    dtype: torch.dtype
    number: float | None


def outcome(node: fx.Node, numbers: Mapping[fx.Node, float | None]) -> float | None:
    """The number that the elementwise op of ``node`` makes of ``numbers``, whatever its other inputs are.

    Args:
        node: the node.
        numbers: what some of its inputs hold; None for anything, which is also what the others hold.

    Returns:
        None if it depends on what is not known; not-a-number if there is no finite one although there is for other
        numbers, as with ``1 / 0``.
    """

    def stand(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            return _Stand(value.dtype, numbers.get(source))
        if value is not None:
            return size_hint(value) if isinstance(value, torch.SymInt) else value
        return torch.device("cpu") if source.args[1:] == ("device",) else torch.float64

    try:
        return _outcome(node.target, *fx.map_arg((node.args, node.kwargs), stand))  # type: ignore[arg-type]
    except Exception:  # whatever an op says to arguments of one axis, or of no value that is known
        return None


@lru_cache(maxsize=4096)
def _outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> float | None:
    anything, known = (_results(function, args, kwargs, use) for use in (False, True))
    defined = anything.isfinite()
    if not known[defined].isfinite().all():
        return math.nan
    found = set(known[defined].tolist())
    return float(found.pop()) if len(found) == 1 else None


def _results(function: Callable[..., Any], args: Any, kwargs: Any, use_numbers: bool) -> torch.Tensor:
    """All results of ``function`` for inputs that are drawn, or hold their number where that is asked for."""
    generator = torch.Generator().manual_seed(0)

    def fill(argument: Any) -> Any:
        if isinstance(argument, _Stand):
            found = drawn(argument.dtype, generator)
            return torch.full_like(found, argument.number) if use_numbers and argument.number is not None else found
        if isinstance(argument, list | tuple):
            return [fill(item) for item in argument]
        return {name: fill(item) for name, item in argument.items()} if isinstance(argument, dict) else argument

    leaves = tree_leaves(function(*fill(args), **fill(kwargs)))
    parts = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
    return torch.cat([part.reshape(-1).to(torch.float64) for part in parts])


def drawn(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Floats of both signs, small and large; complex ones; whole numbers above zero; both truth values."""
    if dtype == torch.bool:
        return torch.rand(_DRAWS, generator=generator) < 0.5
    if dtype.is_complex:
        return torch.randn(_DRAWS, generator=generator, dtype=torch.complex128) * 3
    if not dtype.is_floating_point:
        return torch.randint(1, 5, (_DRAWS,), generator=generator).to(dtype)
    return torch.randn(_DRAWS, generator=generator, dtype=torch.float64) * 3
