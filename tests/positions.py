"""Axis expressions by brute force: an axis is a list of positions, a position the units it belongs to."""

import itertools

from hypothesis import strategies as st

from fxprune.axes import UNIT, Concat, Expr, Factor, Product, concat, product

Position = tuple[tuple[Factor, int], ...]

POOL = tuple(Factor(size, -1 - i) for i, size in enumerate((2, 2, 3, 4, 5)))
EMPTY = Concat(())


def expand(expr: Expr) -> list[Position]:
    """Every position of an axis as its units, the slowest varying first."""
    if isinstance(expr, Factor):
        return [((expr, unit),) for unit in range(expr.size)]
    parts = [expand(part) for part in expr.parts]
    if isinstance(expr, Concat):
        return [position for part in parts for position in part]
    return [tuple(unit for piece in pieces for unit in piece) for pieces in itertools.product(*parts)]


def is_normal(expr: Expr) -> bool:
    """Whether a term has the form the module promises."""
    if isinstance(expr, Factor):
        return expr.size > 1
    if isinstance(expr, Concat):
        fits = all(part.size and not isinstance(part, Concat) for part in expr.parts)
        return len(expr.parts) != 1 and fits and all(map(is_normal, expr.parts))
    fits = all(isinstance(part, Factor) for part in expr.parts[:-1])
    nested = any(isinstance(part, Product) for part in expr.parts)
    return len(expr.parts) != 1 and fits and not nested and all(map(is_normal, expr.parts))


def exprs(max_leaves: int = 5) -> st.SearchStrategy[Expr]:
    """Terms over a small pool, so that the same one is met by several ways."""
    leaves = st.sampled_from((*POOL, UNIT))
    return st.recursive(
        leaves,
        lambda inner: st.builds(
            lambda build, parts: build(*parts),
            st.sampled_from((product, concat)),
            st.lists(inner, min_size=1, max_size=3),
        ),
        max_leaves=max_leaves,
    ).filter(lambda expr: expr.size <= 200)
