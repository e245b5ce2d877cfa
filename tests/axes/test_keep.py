"""What a removal leaves of an axis, against brute force over positions."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxprune.axes import Expr, Factor, Keep, concat, factors, kept_mask, kept_size, product, unit_index
from tests.positions import POOL, Position, expand, exprs


@st.composite
def kept(draw: st.DrawFn) -> tuple[Expr, Keep]:
    """A term and kept units of some of its factors, one of them by outer unit."""
    outer, inner, other = Factor(3, -20), Factor(4, -21), Factor(2, -22)
    beside = draw(exprs(3))
    nested = product(outer, draw(st.sampled_from((inner, product(other, inner), concat(inner, other, inner)))))
    expr = draw(st.sampled_from((nested, concat(beside, nested), product(nested, beside), product(other, nested))))
    bits = lambda size: np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)  # noqa: E731
    units = {factor: bits(factor.size) for factor in (*POOL[:3], outer, other)}
    count = draw(st.integers(0, 4))
    rows = [np.isin(np.arange(4), draw(st.permutations(range(4)))[:count]) for _ in range(3)]
    return expr, Keep({**units, inner: np.stack(rows)}, {inner: outer})


def stays(position: Position, keep: Keep) -> bool:
    """Whether all units of a position do."""
    at = dict(position)
    for factor, unit in position:
        mask = keep.units.get(factor)
        if mask is not None and not (mask[at[keep.outer[factor]], unit] if mask.ndim == 2 else mask[unit]):
            return False
    return True


@settings(max_examples=200)
@given(kept())
def test_kept_positions_are_those_whose_units_all_stay(case: tuple[Expr, Keep]) -> None:
    expr, keep = case
    mask = kept_mask(expr, keep)
    assert mask.tolist() == [stays(position, keep) for position in expand(expr)]
    assert kept_size(expr, keep) == mask.sum()
    for factor in factors(expr):
        assert keep.touches(factor) == (keep.count(factor) < factor.size)


@given(exprs(4), st.sampled_from(POOL))
def test_unit_index_names_the_unit_of_each_position(expr: Expr, factor: Factor) -> None:
    assume(all(len(dict(position)) == len(position) for position in expand(expr)))  # no factor twice in one product
    assert unit_index(expr, factor).tolist() == [dict(position).get(factor, -1) for position in expand(expr)]
