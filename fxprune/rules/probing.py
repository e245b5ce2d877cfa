"""Properties of elementwise ops, found by calling them on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.graph.tensors import read_argument, with_argument

__all__ = ["drawn", "outcome", "power_of", "scaled_literal", "shift_of"]

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


_SCALES = (2.0, 3.0)
"""Inputs are multiplied by powers of each: a power that one of them shows by accident the other does not."""

_NEAR = 1e-9
"""Largest relative difference of two results that count as one; everything is computed in float64."""


def power_of(node: fx.Node, powers: Mapping[fx.Node, float]) -> float | None:
    """The power of ``r`` that comes out where inputs are multiplied by powers of ``r``; None where none does.

    Args:
        node: an elementwise op.
        powers: of the inputs that are multiplied; the others are what they are.
    """
    return _power(node, powers, None, 0.0)


def scaled_literal(node: fx.Node, powers: Mapping[fx.Node, float]) -> tuple[tuple[Any, ...], float, float] | None:
    """The number among the arguments of a node that has to be multiplied too, for a power of ``r`` to come out.

    So it is with a small number that is added, or taken for a bound.

    Args:
        node: an elementwise op.
        powers: of the inputs that are multiplied by powers of ``r``, all of them one power.

    Returns:
        Where it stands; the power of ``r`` that it lacks for ``f(r^p x, e) = r^q f(x, r^a e)``, which is ``a``; and
        ``q``. None where there is none.
    """
    if len(set(powers.values())) != 1:
        return None
    lacks = -next(iter(powers.values()))
    for path in _literals(node):
        power = _power(node, powers, path, lacks)
        if power is not None:
            return path, lacks, power
    return None


def shift_of(node: fx.Node) -> float | None:
    """The number that an elementwise op of one tensor adds to it; None where it does something else."""
    (source,) = node.all_input_nodes
    plain, value = _call(node, {}), source.meta.get("val")
    if plain is None or not isinstance(value, torch.Tensor):
        return None
    shifts = plain - drawn(value.dtype, torch.Generator().manual_seed(0)).to(torch.float64)
    return float(shifts[0]) if bool(((shifts - shifts[0]).abs() <= _NEAR).all()) else None


def _power(
    node: fx.Node, powers: Mapping[fx.Node, float], literal: tuple[Any, ...] | None, lacks: float
) -> float | None:
    found = []
    for scale in _SCALES:
        moved = _call(node, _factors(powers, scale))
        plain = _call(node, {}, literal, scale**lacks)
        ratio = None if moved is None or plain is None else _ratio(moved, plain)
        if ratio is None or ratio <= 0:
            return None
        found.append(math.log(ratio) / math.log(scale))
    return round(found[0], 6) if abs(found[0] - found[1]) <= _NEAR else None


def _factors(powers: Mapping[fx.Node, float], scale: float) -> dict[fx.Node, float]:
    return {node: scale**power for node, power in powers.items()}


def _literals(node: fx.Node) -> Iterator[tuple[Any, ...]]:
    """Where numbers stand among the arguments of a node."""
    for root, held in (("args", enumerate(node.args)), ("kwargs", node.kwargs.items())):
        yield from ((root, key) for key, value in held if isinstance(value, float | int) and type(value) is not bool)


def _call(
    node: fx.Node, factors: Mapping[fx.Node, float], literal: tuple[Any, ...] | None = None, factor: float = 1.0
) -> torch.Tensor | None:
    """The results of a node for inputs that are drawn, some multiplied; None where it cannot be called on them."""
    generator = torch.Generator().manual_seed(0)

    def stand(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            return drawn(value.dtype, generator) * factors.get(source, 1)
        return size_hint(value) if isinstance(value, torch.SymInt) else value

    arguments = fx.map_arg((node.args, node.kwargs), stand)
    if literal is not None:
        arguments = with_argument(arguments, literal, read_argument(node, literal) * factor)
    try:
        leaves = tree_leaves(node.target(*arguments[0], **arguments[1]))  # type: ignore[operator]
        return torch.cat([leaf.reshape(-1).to(torch.float64) for leaf in leaves])
    except Exception:  # whatever an op says to arguments of one axis, or of no value that is known
        return None


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The one number that ``a`` is of ``b``, to be had wherever either has a value; None where there is none."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a == 0, b == 0):
        return None
    told = ~a.isnan() & (a != 0)
    quotients = (a / b)[told]
    if not len(quotients) or not quotients.isfinite().all():
        return None
    middle = float(quotients.median())
    return middle if bool(((quotients - middle).abs() <= _NEAR * abs(middle)).all()) else None
