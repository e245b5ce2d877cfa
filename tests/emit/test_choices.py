"""Ways to give a block, and the model around the blocks, the wanted shapes."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.emit.layout import find_layout, model_rebuilder
from fxprune.emit.patch import leaf_patches
from fxprune.emit.snapshot import Shape, shapes_of
from fxprune.emit.solve import Choice, SharedWidths, choices_for, shared_widths_for
from tests.emit.small import SmallModel, rebuilder, small


def choose(model: SmallModel, wanted: Mapping[str, Shape]) -> list[Choice]:
    """Choices for the first block, with nothing around it."""
    return list(choices_for(model.blocks[0], rebuilder(model), [{}], wanted, lambda _: 0))


def test_a_block_that_stays_needs_nothing_and_fields_come_first() -> None:
    model = small()
    assert choose(model, shapes_of(model.blocks[0]))[0] == Choice({})
    assert [*choices_for(model.blocks[0], None, [{}], shapes_of(model.blocks[0]), lambda _: 0)] == [Choice({})]
    first = choose(small(), shapes_of(small(inner=14).blocks[0]))[0]
    assert (first.fields, first.patches, first.gap) == ({"inner": 14}, {}, ())


def test_attributes_are_set_where_no_field_gives_a_shape() -> None:
    model = small()
    wanted = {**shapes_of(model.blocks[0]), "up.weight": (7, 12), "up.bias": (7,), "down.weight": (12, 7)}
    choices = choose(model, wanted)
    assert all(choice.gap for choice in choices), "the class refuses odd widths"
    assert choices[-1].patches["up"]["out_features"] == choices[-1].patches["down"]["in_features"] == 7
    wanted |= {"up.weight": (8, 12), "up.bias": (8,), "down.weight": (12, 8)}
    (only,) = choices_for(model.blocks[0], None, [{}], wanted, lambda _: 0)
    assert only.as_dense and only.patches == {"up": {"out_features": 8}, "down": {"in_features": 8}}


def around(model: SmallModel, hidden: int) -> dict[str, Shape]:
    """Shapes outside the blocks."""
    return {"embed.weight": (17, hidden), "norm.weight": (hidden,), "norm.bias": (hidden,)}


def test_a_field_that_gives_all_shapes_comes_first() -> None:
    model = small()
    rebuilder = model_rebuilder(model, find_layout(model), {})
    found = shared_widths_for(rebuilder, around(model, 9))
    assert found[0].fields["hidden"] == 9 and found[-1] == SharedWidths({})
    built, dense = rebuilder.build(found[0].fields), rebuilder.build({})
    assert built is not None and leaf_patches(built, around(model, 9), rebuilder.skip) == {}
    wanted = {**around(model, 12), "embed.weight": (15, 12)}
    assert [shared.fields for shared in shared_widths_for(rebuilder, wanted)] == [{}]
    assert dense is not None and leaf_patches(dense, wanted, rebuilder.skip) == {"embed": {"num_embeddings": 15}}
