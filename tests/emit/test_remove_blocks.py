"""Blocks taken out of a model."""

from __future__ import annotations

from fxprune.emit.blocks import remove_blocks
from fxprune.emit.layout import survey
from fxprune.modelling.blocks import BUILT_AT
from tests.emit.small import small


def test_blocks_behind_move_up() -> None:
    model = small(depth=3)
    first, _, last = model.blocks
    vars(last)["window"] = 2
    remove_blocks(model, ("blocks.1",), survey(model))
    assert list(model.blocks) == [first, last] and model.config.depth == 2
    assert (first.layer_idx, last.layer_idx) == (0, 1)
    assert vars(last)["window"] == 2, "not called like an index"
    assert BUILT_AT not in vars(last)


def test_a_block_of_another_kind_says_where_it_was_built() -> None:
    model = small()
    remove_blocks(model, ("blocks.0",), survey(model))
    assert BUILT_AT not in vars(model.blocks[1])
    assert vars(model.blocks[2])[BUILT_AT] == {"index": 3, "fields": {"depth": 4}}
    assert model.blocks[2].layer_idx == 2
    again = small(depth=3)
    remove_blocks(again, (), survey(again))
    assert len(again.blocks) == 3
