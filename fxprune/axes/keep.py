"""What a removal leaves: the kept units of factors, and from them the kept positions of any axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from fxprune.axes.expr import Concat, Expr, Factor

__all__ = ["Keep", "kept_mask", "kept_size", "unit_index"]

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Keep:
    """The kept units of each pruned factor.

    Args:
        units: for a factor of ``n`` units a boolean array ``(n,)``, true where the unit stays. A factor that occurs
            only inside another of ``m`` units may instead hold ``(m, n)``: a choice of its own inside each outer
            unit, the same number in every row.
        outer: for those, the factor that is around.
    """

    units: Mapping[Factor, Mask] = field(default_factory=dict)
    outer: Mapping[Factor, Factor] = field(default_factory=dict)

    def count(self, factor: Factor) -> int:
        """Return how many units of ``factor`` stay (inside one outer unit, where it is nested)."""
        mask = self.units.get(factor)
        return factor.size if mask is None else int(mask.reshape(-1, factor.size)[0].sum())

    def touches(self, factor: Factor) -> bool:
        """Whether any unit of ``factor`` goes."""
        return self.count(factor) < factor.size


def kept_size(expr: Expr, keep: Keep) -> int:
    """Return the size of the axis ``expr`` after the removal."""
    if isinstance(expr, Factor):
        return keep.count(expr)
    sizes = [kept_size(part, keep) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)


def kept_mask(expr: Expr, keep: Keep) -> Mask:
    """Which positions of the axis ``expr`` stay: boolean ``(size,)``."""
    mask: Mask = _mask(expr, keep, {}, 1)[0]
    return mask


def _mask(expr: Expr, keep: Keep, around: dict[Factor, Index], rows: int) -> Mask:
    """The mask ``(rows, size)`` of ``expr`` below ``rows`` positions, whose outer units are ``around``."""
    if isinstance(expr, Factor):
        units = keep.units.get(expr)
        if units is None:
            return np.ones((rows, expr.size), dtype=bool)
        return units[around[keep.outer[expr]]] if units.ndim == 2 else np.broadcast_to(units, (rows, expr.size))
    if isinstance(expr, Concat):
        return np.concatenate([_mask(part, keep, around, rows) for part in expr.parts], axis=1)
    mask, width = np.ones((rows, 1), dtype=bool), 1
    for part in expr.parts:
        below = _mask(part, keep, around, rows * width)
        mask = (mask.reshape(-1, 1) & below).reshape(rows, -1)
        around = {factor: np.repeat(index, part.size) for factor, index in around.items()}
        if isinstance(part, Factor):
            around[part] = np.tile(np.arange(part.size), rows * width)
        width *= part.size
    return mask


def unit_index(expr: Expr, factor: Factor) -> Index:
    """Which unit of ``factor`` each position of ``expr`` belongs to: ``(size,)``, -1 where to none."""
    if isinstance(expr, Factor):
        return np.arange(expr.size) if expr == factor else np.full(expr.size, -1)
    if isinstance(expr, Concat):
        return np.concatenate([unit_index(part, factor) for part in expr.parts])
    index = np.full(1, -1)
    for part in expr.parts:
        index = np.maximum(index[:, None], unit_index(part, factor)[None, :]).reshape(-1)
    return index
