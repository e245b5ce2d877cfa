"""Where the blocks of a model are."""

from __future__ import annotations

from torch import nn

from fxprune.emit.layout import survey
from tests.emit.small import small
from tests.models import tiny


def test_blocks_and_what_counts_them_are_found() -> None:
    layout = survey(small())
    assert (layout.part, layout.count_field, layout.depth) == ("", "depth", 4)
    assert list(layout.blocks()) == [f"blocks.{index}" for index in range(4)]
    assert [index for index, _ in layout.blocks().values()] == [0, 1, 2, 3]


def test_a_model_without_blocks_has_none() -> None:
    model = small()
    model.blocks = nn.ModuleList()
    layout = survey(model)
    assert (layout.stacks, layout.depth, layout.count_field) == ((), 0, None)


def test_a_field_of_the_same_value_does_not_count_blocks() -> None:
    layout = survey(small(heads=4, hidden=16))
    assert layout.count_field == "depth"


def test_blocks_that_nothing_counts() -> None:
    model = small()
    del model.blocks[0]
    assert survey(model).count_field is None


def test_lists_may_count_blocks() -> None:
    layout = survey(tiny("gemma3_text"))
    assert layout.depth == 3 and layout.count_field is not None
    assert layout.stacks[0].path == "model.layers"
