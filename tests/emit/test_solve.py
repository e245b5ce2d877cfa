"""Config fields are solved for from the shapes that are wanted."""

from __future__ import annotations

from fxprune.emit.snapshot import shapes_of
from fxprune.emit.solve import Search, explicit_fields, minimal
from tests.emit.small import rebuilder, small


def test_one_field_is_found() -> None:
    block = rebuilder(small())
    search = Search(block, {}, shapes_of(small(inner=14).blocks[0]))
    assert search.solutions() == [{"inner": 14}]


def test_a_default_is_made_explicit_so_that_others_can_move_alone() -> None:
    model = small()
    block = rebuilder(model)
    dense = block.observe({})
    assert dense is not None
    optional = explicit_fields(block, dense)
    assert optional == {"head_dim": 4}
    wanted = shapes_of(small(heads=2, head_dim=4).blocks[0])
    solutions = Search(block, optional, wanted).solutions()
    assert {"heads": 2} in solutions
    assert minimal(block, {}, {"heads": 2}, optional) == {"heads": 2, "head_dim": 4}
    assert minimal(block, {}, {"inner": 14}, optional) == {"inner": 14}, "the default stands for itself"


def test_nothing_reaches_a_shape_of_its_own() -> None:
    model = small()
    wanted = {**shapes_of(model.blocks[0]), "up.weight": (14, 12), "up.bias": (14,), "back.weight": (12, 11)}
    search = Search(rebuilder(model), {}, wanted)
    assert search.solutions() == [] and search.best == {}
    assert search.wrong({}) == {("up.weight", 0), ("up.bias", 0), ("back.weight", 1)}
    assert search.wrong({"inner": 7}) is None


def test_only_the_axes_that_count_have_to_be_right() -> None:
    model = small()
    wanted = {**shapes_of(model.blocks[0]), "up.weight": (14, 12)}
    search = Search(rebuilder(model), {}, wanted, counted=frozenset({("up.weight", 0)}))
    assert search.solutions() == [{"inner": 14}]


def test_a_search_ends_at_its_limit() -> None:
    search = Search(rebuilder(small()), {}, shapes_of(small(inner=14).blocks[0]), limit=0)
    assert search.solutions() == []
