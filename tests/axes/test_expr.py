"""Axis expressions and their normal form, against brute force over positions."""

from __future__ import annotations

import itertools
from math import prod

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxprune.axes import UNIT, Expr, Factor, beside, concat, contains, factors, new_factor, product, render
from tests.positions import EMPTY, POOL, expand, exprs, is_normal


@given(st.lists(exprs(), max_size=3))
def test_product_and_concat_mean_what_they_say(parts: list[Expr]) -> None:
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


def test_a_product_does_not_distribute_over_a_concatenation_on_its_right() -> None:
    a, b, c = POOL[:3]
    assert product(a, concat(b, c)) != concat(product(a, b), product(a, c))


@settings(max_examples=300)
@given(exprs(4), exprs(4))
def test_terms_are_equal_exactly_when_their_positions_are(a: Expr, b: Expr) -> None:
    assert (a == b) == (expand(a) == expand(b))


@given(exprs())
def test_factors_are_found_from_left_to_right(expr: Expr) -> None:
    seen = list(dict.fromkeys(factor for position in expand(expr) for factor, _ in position))
    assert list(dict.fromkeys(factors(expr))) == seen
    assert [contains(expr, factor) for factor in POOL] == [factor in seen for factor in POOL]


def test_render_reads_like_the_design_says() -> None:
    kv, rep, rot = Factor(3, 0), Factor(2, 1), Factor(8, 2)
    names = {kv: "kv", rep: "rep", rot: "rot"}
    assert render(product(kv, rep, concat(rot, rot)), names.__getitem__) == "(kv:3 * rep:2 * [rot:8 | rot:8])"
    assert (render(UNIT), render(rep)) == ("1", "f1:2")


def test_new_factors_are_unlike_any_other() -> None:
    assert new_factor(1) is UNIT
    assert new_factor(4) != new_factor(4)


def test_what_stands_beside_a_factor() -> None:
    a, b, c, d = (new_factor(size) for size in (2, 3, 4, 5))
    assert isinstance(a, Factor) and isinstance(c, Factor) and isinstance(d, Factor)
    expr = concat(product(a, b, c), d, product(b, concat(c, a)))
    assert list(beside(expr, a)) == [((), (b, c)), ((b,), ())]
    assert list(beside(expr, c)) == [((a, b), ()), ((b,), ())]
    assert list(beside(expr, d)) == [((), ())]
    assert list(beside(product(a, b), c)) == []


@given(exprs())
def test_each_place_of_a_factor_has_its_neighbours(expr: Expr) -> None:
    for factor in set(factors(expr)):
        places = list(beside(expr, factor))
        assert len(places) == sum(found == factor for found in factors(expr))
        assert all(factor.size * prod(f.size for f in before) <= expr.size for before, _ in places)
