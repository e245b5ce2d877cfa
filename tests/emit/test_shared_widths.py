"""Widths that the whole model shares."""

from __future__ import annotations

from fxprune.emit.choices import SharedWidths, shared_widths_for
from fxprune.emit.layout import model_rebuilder, survey
from fxprune.emit.snapshot import Shape
from tests.emit.small import SmallModel, small


def around(model: SmallModel, hidden: int) -> dict[str, Shape]:
    """Shapes outside the blocks."""
    return {"embed.weight": (17, hidden), "norm.weight": (hidden,), "norm.bias": (hidden,)}


def test_nothing_changes_where_nothing_has_to() -> None:
    model = small()
    assert shared_widths_for(model_rebuilder(model, survey(model)), around(model, 12)) == [SharedWidths({})]


def test_a_field_that_gives_all_shapes_comes_first() -> None:
    model = small()
    rebuilder = model_rebuilder(model, survey(model))
    found = shared_widths_for(rebuilder, around(model, 9))
    assert found[0].fields["hidden"] == 9 and found[-1] == SharedWidths({})
    assert found[0].patches(rebuilder, around(model, 9), {}) == {}


def test_attributes_are_set_where_no_field_reaches() -> None:
    model = small()
    rebuilder = model_rebuilder(model, survey(model))
    wanted = {**around(model, 12), "embed.weight": (15, 12)}
    assert [shared.fields for shared in shared_widths_for(rebuilder, wanted)] == [{}]
    assert SharedWidths({}).patches(rebuilder, wanted, {}) == {"embed": {"num_embeddings": 15}}
