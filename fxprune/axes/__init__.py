"""The axis algebra: what an axis is made of, when two axes are the same, and what a removal leaves of one."""

from fxprune.axes.expr import (
    UNIT,
    Concat,
    Expr,
    Factor,
    Product,
    beside,
    concat,
    contains,
    factors,
    new_factor,
    product,
    render,
)
from fxprune.axes.keep import Keep, kept_mask, kept_size, unit_index
from fxprune.axes.solver import Freeze, Solver

__all__ = [
    "UNIT",
    "Concat",
    "Expr",
    "Factor",
    "Freeze",
    "Keep",
    "Product",
    "Solver",
    "beside",
    "concat",
    "contains",
    "factors",
    "kept_mask",
    "kept_size",
    "new_factor",
    "product",
    "render",
    "unit_index",
]
