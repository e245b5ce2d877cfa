"""Numeric properties of elementwise ops, found by calling them on random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.graph.tensors import read_argument, with_argument

_COUNT = 32
"""Number of random values: enough to include both signs, small and large numbers, and both truth values for sure."""


@dataclass(frozen=True)
class _Operand:
    """Stands for a node of an op's arguments: a tensor of one ``number``, or of random numbers times ``factor``."""

    dtype: torch.dtype
    number: float | None = None
    factor: float | None = None


def constant_result(node: fx.Node, numbers: Mapping[fx.Node, float | None]) -> float | None:
    """The number that an elementwise op returns for the known ``numbers``, whatever its other inputs are.

    Returns:
        None if the result depends on unknown values; NaN if it is not finite although it is for other numbers, as with
        ``1 / 0``.
    """
    try:
        arguments = _arguments(node, lambda source, dtype: _Operand(dtype, numbers.get(source)))
        return _constant_result(node.target, *arguments)
    except Exception:  # the op may refuse tensors of one axis, or an unknown value
        return None


def _arguments(node: fx.Node, operand: Callable[[fx.Node, torch.dtype], _Operand]) -> tuple[Any, Any]:
    """The arguments of ``node``, with an ``operand`` for each tensor."""

    def argument(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            return operand(source, value.dtype)
        if value is not None:
            return size_hint(value) if isinstance(value, torch.SymInt) else value
        return torch.device("cpu") if source.args[1:] == ("device",) else torch.float64

    return fx.map_arg((node.args, node.kwargs), argument)


@lru_cache(maxsize=4096)
def _constant_result(function: Any, args: Any, kwargs: Any) -> float | None:
    anything, known = (_results(function, args, kwargs, use) for use in (False, True))
    defined = anything.isfinite()
    if not known[defined].isfinite().all():
        return math.nan
    found = set(known[defined].tolist())
    return float(found.pop()) if len(found) == 1 else None


def _results(function: Any, args: Any, kwargs: Any, use_numbers: bool) -> torch.Tensor:
    """All results of ``function`` as one tensor; with ``use_numbers``, operands that have a number hold it."""
    generator = torch.Generator().manual_seed(0)

    def fill(argument: Any) -> Any:
        if isinstance(argument, _Operand):
            found = _random_values(argument.dtype, generator)
            if use_numbers and argument.number is not None:
                return torch.full_like(found, argument.number)
            return found if argument.factor is None else found * argument.factor
        if isinstance(argument, list | tuple):
            return [fill(item) for item in argument]
        return {name: fill(item) for name, item in argument.items()} if isinstance(argument, dict) else argument

    return _numbers_in(function(*fill(args), **fill(kwargs)))


def _numbers_in(result: Any) -> torch.Tensor:
    """All numbers in tensors, with the real and the imaginary part of a complex one as two."""
    leaves = tree_leaves(result)
    parts = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
    return torch.cat([part.reshape(-1).to(torch.float64) for part in parts])


def _random_values(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Floats of both signs, small and large; complex numbers; positive integers; both truth values."""
    if dtype == torch.bool:
        return torch.rand(_COUNT, generator=generator) < 0.5
    if dtype.is_complex:
        return torch.randn(_COUNT, generator=generator, dtype=torch.complex128) * 3
    if not dtype.is_floating_point:
        return torch.randint(1, 5, (_COUNT,), generator=generator).to(dtype)
    return torch.randn(_COUNT, generator=generator, dtype=torch.float64) * 3


_SCALES = (2.0, 3.0)
"""Inputs are multiplied by powers of each: a power that one of them shows by accident the other does not."""

_TOLERANCE = 1e-9
"""Largest relative difference of two results that count as equal; everything is computed in float64."""


def scaling_power(node: fx.Node, powers: Mapping[fx.Node, float]) -> float | None:
    """The ``q`` in ``f(r^p x, y) = r^q f(x, y)`` for every ``r``, given ``powers`` (``p``) of some inputs; or None."""
    return _power(node, powers, None, 0.0)


def scaled_literal(node: fx.Node, powers: Mapping[fx.Node, float]) -> tuple[tuple[Any, ...], float, float] | None:
    """The literal ``e`` of an elementwise op that must be scaled with its inputs: ``f(r^p x, e) = r^q f(x, r^a e)``.

    Such a literal is a small number that is added, or a bound. ``powers`` has ``p``, the same for all scaled inputs.

    Returns:
        The path of ``e`` among the arguments, ``a`` and ``q``; None if there is no such literal.
    """
    if len(set(powers.values())) != 1:
        return None
    missing = -next(iter(powers.values()))
    for root, held in (("args", enumerate(node.args)), ("kwargs", node.kwargs.items())):
        for key, value in held:
            if not isinstance(value, float | int) or isinstance(value, bool):
                continue
            power = _power(node, powers, (root, key), missing)
            if power is not None:
                return (root, key), missing, power
    return None


def shift_of(node: fx.Node) -> float | None:
    """The number that an elementwise op of one tensor adds to it; None if it does anything else."""
    (source,) = node.all_input_nodes
    plain, value = _call(node, {}), source.meta.get("val")
    if plain is None or not isinstance(value, torch.Tensor):
        return None
    given = _numbers_in(_random_values(value.dtype, torch.Generator().manual_seed(0)))
    if plain.shape != given.shape:
        return None
    shifts = plain - given
    return float(shifts[0]) if bool(((shifts - shifts[0]).abs() <= _TOLERANCE).all()) else None


def _power(
    node: fx.Node, powers: Mapping[fx.Node, float], literal: tuple[Any, ...] | None, missing: float
) -> float | None:
    found = []
    for scale in _SCALES:
        scaled = _call(node, {source: scale**power for source, power in powers.items()})
        plain = _call(node, {}, literal, scale**missing)
        if scaled is None or plain is None or scaled.shape != plain.shape:
            return None
        if not torch.equal(scaled.isnan(), plain.isnan()) or not torch.equal(scaled == 0, plain == 0):
            return None
        quotients = (scaled / plain)[~scaled.isnan() & (scaled != 0)]
        if not len(quotients) or not quotients.isfinite().all():
            return None
        ratio = float(quotients.median())
        if ratio <= 0 or not ((quotients - ratio).abs() <= _TOLERANCE * ratio).all():
            return None
        found.append(math.log(ratio) / math.log(scale))
    return round(found[0], 6) if abs(found[0] - found[1]) <= _TOLERANCE else None


def _call(
    node: fx.Node, factors: Mapping[fx.Node, float], literal: tuple[Any, ...] | None = None, factor: float = 1.0
) -> torch.Tensor | None:
    """The results of a node for random inputs times ``factors``; None if it cannot be called on them."""
    arguments = _arguments(node, lambda source, dtype: _Operand(dtype, factor=factors.get(source, 1)))
    if literal is not None:
        arguments = with_argument(arguments, literal, read_argument(node, literal) * factor)
    try:
        return _results(node.target, *arguments, use_numbers=False)
    except Exception:  # the op may refuse tensors of one axis, or an unknown value
        return None
