"""The axis algebra: expressions, their unification, and the positions that a removal keeps."""

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxprune.axes import (
    UNIT,
    Concat,
    Expr,
    Factor,
    Keep,
    Product,
    Solver,
    beside,
    concat,
    factors,
    kept_mask,
    kept_positions,
    kept_size,
    new_factor,
    product,
    render,
    unit_index,
    weight_mask,
)
from fxprune.errors import AxisMismatch
from tests.positions import EMPTY, POOL, Position, expand, exprs, is_normal


@given(st.lists(exprs(), max_size=3))
def test_product_and_concat_enumerate_their_positions(parts: list[Expr]) -> None:
    assume(prod(part.size for part in parts) <= 2000)
    rows = [sum(pieces, ()) for pieces in itertools.product(*map(expand, parts))]
    assert expand(product(*parts)) == rows
    assert expand(concat(*parts)) == [position for part in parts for position in expand(part)]


@given(exprs(), exprs())
def test_every_term_is_in_normal_form_with_its_size(a: Expr, b: Expr) -> None:
    for term in (a, product(a, b), concat(a, b)):
        assert is_normal(term)
        assert term.size == len(expand(term))
    assert product(a, b).size == a.size * b.size
    assert concat(a, b).size == a.size + b.size


@given(exprs(4), exprs(4), exprs(4))
def test_laws(a: Expr, b: Expr, c: Expr) -> None:
    assert product(a, product(b, c)) == product(product(a, b), c) == product(a, b, c)
    assert concat(a, concat(b, c)) == concat(concat(a, b), c) == concat(a, b, c)
    assert product(a, UNIT) == product(UNIT, a) == product(a) == concat(a) == a
    assert concat(a, EMPTY) == concat(EMPTY, a) == a
    assert product(concat(a, b), c) == concat(product(a, c), product(b, c))
    a, b, c = POOL[:3]
    assert product(a, concat(b, c)) != concat(product(a, b), product(a, c)), "not on the right"


@settings(max_examples=150)
@given(exprs(4), exprs(4))
def test_terms_are_equal_exactly_when_their_positions_are(a: Expr, b: Expr) -> None:
    assert (a == b) == (expand(a) == expand(b))


@given(exprs())
def test_factors_are_found_from_left_to_right(expr: Expr) -> None:
    seen = list(dict.fromkeys(factor for position in expand(expr) for factor, _ in position))
    assert list(dict.fromkeys(factors(expr))) == seen


def test_rendered_expressions_and_neighbours_of_a_factor() -> None:
    kv, rep, rot = Factor(3, 0), Factor(2, 1), Factor(8, 2)
    names = {kv: "kv", rep: "rep", rot: "rot"}
    assert render(product(kv, rep, concat(rot, rot)), names.__getitem__) == "(kv * rep * [rot | rot])"
    assert (render(UNIT), render(rep)) == ("1", "f1:2")
    assert new_factor(1) is UNIT and new_factor(4) != new_factor(4)
    a, b, c, d = (Factor(size, size) for size in (2, 3, 4, 5))
    expr = concat(product(a, b, c), d, product(b, concat(c, a)))
    assert list(beside(expr, a)) == [((), (b, c)), ((b,), ())]
    assert list(beside(expr, c)) == [((a, b), ()), ((b,), ())]
    assert list(beside(expr, d)) == [((), ())] and list(beside(product(a, b), c)) == []


@st.composite
def same_size(draw: st.DrawFn, count: int = 2) -> list[Expr]:
    """Several terms of one size over fresh factors, some shared."""
    pool: list[Expr] = []

    def term(size: int, depth: int) -> Expr:
        kind = draw(st.sampled_from(("factor", "product", "concat"))) if depth and size > 1 else "factor"
        divisors = [d for d in range(2, size) if size % d == 0]
        if kind == "product" and divisors:
            outer = draw(st.sampled_from(divisors))
            return product(term(outer, depth - 1), term(size // outer, depth - 1))
        if kind == "concat":
            first = draw(st.integers(1, size - 1))
            return concat(term(first, depth - 1), term(size - first, depth - 1))
        known = [factor for factor in pool if factor.size == size]
        if known and draw(st.booleans()):
            return draw(st.sampled_from(known))
        pool.append(new_factor(size))
        return pool[-1]

    size = draw(st.sampled_from((4, 6, 8)))
    return [term(size, 2) for _ in range(count)]


def unify_all(solver: Solver, terms: list[Expr]) -> bool:
    """Unify neighbours; return whether that was possible."""
    try:
        for a, b in itertools.pairwise(terms):
            solver.unify(a, b)
    except AxisMismatch:
        return False
    return True


@settings(max_examples=150)
@given(same_size(3))
def test_unified_terms_resolve_to_the_same_normal_form(terms: list[Expr]) -> None:
    """A position of a term is, for each of its units, a position of the resolution of that unit's factor."""
    solver = Solver()
    if unify_all(solver, terms):
        assert len({solver.resolve(term) for term in terms}) == 1
    for term in terms:
        found = solver.resolve(term)
        assert found.size == term.size and is_normal(found) and solver.resolve(found) == found
        became = {factor: expand(solver.resolve(factor)) for factor in factors(term)}
        rows = [sum((became[factor][unit] for factor, unit in position), ()) for position in expand(term)]
        assert expand(found) == rows


def all_masks(size: int) -> list[np.ndarray]:
    return [np.array(bits) for bits in itertools.product((False, True), repeat=size)]


@settings(max_examples=40)
@given(same_size(2))
def test_unification_identifies_exactly_what_the_equation_does(terms: list[Expr]) -> None:
    """Removals that respect the equation are those that remove units of the solved factors, no more and no fewer.

    Runs of a single unit are never removed; cases that lead to one are left out.
    """
    a, b = terms
    roots = list(dict.fromkeys((*factors(a), *factors(b))))
    assume(roots and prod(2**root.size for root in roots) <= 5000)
    solver = Solver()
    assume(unify_all(solver, terms))
    assume(all(position for root in roots for position in expand(solver.resolve(root))))
    allowed = set()
    for choice in itertools.product(*(all_masks(root.size) for root in roots)):
        keep = Keep(dict(zip(roots, choice, strict=True)))
        if (kept_mask(a, keep) == kept_mask(b, keep)).all():
            allowed.add(tuple(mask.tobytes() for mask in choice))
    leaves = list(dict.fromkeys(leaf for root in roots for leaf in factors(solver.resolve(root))))
    reached = set()
    for choice in itertools.product(*(all_masks(leaf.size) for leaf in leaves)):
        keep = Keep(dict(zip(leaves, choice, strict=True)))
        reached.add(tuple(kept_mask(solver.resolve(root), keep).tobytes() for root in roots))
    nothing_empty = {masks for masks in allowed if all(any(mask) for mask in masks)}
    assert nothing_empty <= reached <= allowed


@pytest.mark.parametrize("mirrored", [False, True])
def test_axes_that_do_not_fit_are_refused(mirrored: bool) -> None:
    def refused(a: Expr, b: Expr, text: str) -> None:
        with pytest.raises(AxisMismatch, match=text):
            Solver().unify(*((b, a) if mirrored else (a, b)))

    f = {size: Factor(size, 100 + size) for size in (2, 3, 4, 5, 6)}
    refused(f[4], f[5], "units cannot be the same")
    refused(product(f[4], f[3]), product(f[3], Factor(4, 99)), "interleave")
    refused(product(f[4], f[3]), product(f[6], f[2]), "interleave")
    refused(product(f[2], f[4]), concat(f[3], f[5]), "through a unit")
    a, b, c, d = new_factor(2), new_factor(6), new_factor(2), new_factor(6)
    solver = Solver()
    with pytest.raises(AxisMismatch):
        solver.unify(product(a, concat(b, product(f[2], Factor(2, 98)))), product(c, concat(d, f[3], UNIT)))
    assert solver.resolve(a) == solver.resolve(c), "refinements before a mismatch stay"
    assert solver.resolve(b) == solver.resolve(d)


@settings(max_examples=200)
@given(exprs(), st.data())
def test_cut_splits_the_positions_and_refuses_only_inside_a_unit(expr: Expr, data: st.DataObject) -> None:
    solver = Solver()
    at = data.draw(st.integers(0, expr.size))
    try:
        left, right = solver.cut(expr, at)
    except AxisMismatch as error:
        assert "through a unit" in str(error)
        for run in expr.parts if isinstance(expr, Concat) else (expr,):
            if 0 < at < run.size:  # two positions of the same unit of an outer factor of a product
                assert isinstance(run, Product) and expand(run)[at - 1][0] == expand(run)[at][0]
                return
            at -= run.size
        pytest.fail("between two units")
    left, right = solver.resolve(left), solver.resolve(right)
    assert (left.size, right.size) == (at, expr.size - at)
    assert concat(left, right) == solver.resolve(expr)


def test_frozen_and_tagged_factors_follow_refinements() -> None:
    solver = Solver()
    whole, outer, inner, other = new_factor(12), new_factor(3), new_factor(4), new_factor(12)
    solver.freeze(whole, "first", "node_a")
    solver.tag(whole, "head")
    solver.unify(whole, product(outer, inner))
    solver.tag(other, "late")
    solver.unify(other, whole)
    solver.freeze(other, "second", "node_b")
    left, right = solver.cut(inner, 1)
    leaves = [f for f in factors(solver.resolve(concat(outer, left, right))) if f.size > 1]
    assert set(solver.frozen_factors()) == set(leaves)
    assert {str(freeze) for freeze in solver.frozen_factors().values()} == {"first (at node_a)"}
    assert solver.tagged_factors() == dict.fromkeys(leaves, frozenset({"head", "late"}))


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
    """Whether all units of a position stay."""
    at = dict(position)
    for factor, unit in position:
        mask = keep.units.get(factor)
        if mask is not None and not (mask[at[keep.outer[factor]], unit] if mask.ndim == 2 else mask[unit]):
            return False
    return True


@settings(max_examples=100)
@given(kept())
def test_kept_positions_are_those_whose_units_all_stay(case: tuple[Expr, Keep]) -> None:
    expr, keep = case
    mask = kept_mask(expr, keep)
    assert mask.tolist() == [stays(position, keep) for position in expand(expr)]
    assert kept_size(expr, keep) == mask.sum()
    for factor in factors(expr):
        assert keep.touches(factor) == (keep.count(factor) < factor.size)


@settings(max_examples=60)
@given(st.sampled_from((2, 0)), st.booleans(), st.data())
def test_kept_positions_of_a_weight_may_differ_along_its_first_axis(
    width: int, alike: bool, data: st.DataObject
) -> None:
    outer, inner = Factor(3, -20), Factor(4, -21)
    beside = new_factor(width) if width else UNIT
    expr = data.draw(st.sampled_from((inner, product(inner, beside), concat(inner, beside, inner))))
    count = data.draw(st.integers(1, 4))
    rows = [np.isin(np.arange(4), data.draw(st.permutations(range(4)))[:count]) for _ in range(3)]
    keep = Keep({inner: np.stack(rows[:1] * 3 if alike else rows)}, {inner: outer})
    wanted = [[stays((*position, (outer, row)), keep) for position in expand(expr)] for row in range(3)]
    mask = weight_mask((outer, UNIT, expr), 2, keep)
    assert np.broadcast_to(mask, (3, expr.size)).tolist() == wanted
    assert mask.ndim == (1 if wanted[1:] == wanted[:-1] else 2)
    assert np.broadcast_to(kept_positions(mask), (3, kept_size(expr, keep))).tolist() == [
        np.flatnonzero(row).tolist() for row in wanted
    ]
    assert weight_mask((outer, expr), 0, keep).all()
    with pytest.raises(KeyError):  # the axis alone does not tell
        kept_mask(expr, keep)


@given(exprs(4), st.sampled_from(POOL))
def test_unit_index_names_the_unit_of_each_position(expr: Expr, factor: Factor) -> None:
    assume(all(len(dict(position)) == len(position) for position in expand(expr)))  # no factor twice in one product
    assert unit_index(expr, factor).tolist() == [dict(position).get(factor, -1) for position in expand(expr)]
