"""Lists of blocks, the config that describes them, and rebuilding."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fxprune.emit.layout import block_rebuilder, find_layout
from fxprune.emit.snapshot import shapes_of
from fxprune.emit.solve import Search
from tests.emit.small import small
from tests.models import tiny
from tests.zoo_classes import tiny_model_of


def test_blocks_and_what_counts_them_are_found() -> None:
    layout = find_layout(small())
    assert (layout.part, layout.count_field, layout.depth) == ("", "depth", 4)
    assert list(layout.blocks()) == [f"blocks.{index}" for index in range(4)]
    assert [index for index, _ in layout.blocks().values()] == [0, 1, 2, 3]
    assert find_layout(small(heads=4, hidden=16)).count_field == "depth", "not another field of the same value"
    model = small()
    del model.blocks[0]
    assert find_layout(model).count_field is None
    model.blocks = nn.ModuleList()
    layout = find_layout(model)
    assert (layout.stacks, layout.depth, layout.count_field) == ((), 0, None)
    layout = find_layout(tiny("gemma3_text"))  # where lists count blocks
    assert layout.depth == 3 and layout.count_field is not None
    assert layout.stacks[0].path == "model.layers"


def test_each_list_of_blocks_has_its_part_of_the_config() -> None:
    """Vision towers of LLaVA-like models were built from the config of the text."""
    layout = find_layout(tiny_model_of("AutoModelForImageTextToText", "llava"))
    parts = {stack.path: stack.part for stack in layout.stacks}
    assert parts == {
        "model.language_model.layers": "text_config",
        "model.vision_tower.encoder.layers": "vision_config",
    }
    assert layout.part == "text_config" and layout.count_field == "num_hidden_layers"


class Listed(nn.Module):
    """Is as wide as its entry of a list; wider where another list names its index."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.up = nn.Linear(2, config.widths[layer_idx] + (layer_idx in config.wider))


@pytest.mark.parametrize(("wider", "solved"), [([9, 9, 9, 9], [{"widths": 3}]), ([1, 0, 3, 2], [])])
def test_a_block_of_a_width_in_a_list_is_built_from_its_entry(wider: list[int], solved: list[dict[str, int]]) -> None:
    """Where it reads more of a list than its entry, lists are left as they are."""
    model = small()
    vars(model.config).update(widths=[4, 5, 6, 7], wider=wider)
    block = Listed(model.config, 1)
    found = block_rebuilder(model, "", find_layout(model).depth, 1, block, {}, {})
    assert found is not None
    seen = found.observe({})
    assert seen is not None and seen.shapes == shapes_of(block)
    wanted = {"up.weight": (3, 2), "up.bias": (3,)}
    assert Search(found, {}, wanted).solutions() == solved
    if solved:
        built = found.build({"widths": 3})
        assert isinstance(built, Listed) and shapes_of(built) == wanted
    assert model.config.widths == [4, 5, 6, 7]


def test_a_block_that_asks_for_more_is_not_built() -> None:
    class Demanding(nn.Module):
        def __init__(self, config: object, layer_idx: int, other: nn.Module) -> None:
            super().__init__()

    model = small()
    assert block_rebuilder(model, "", find_layout(model).depth, 0, Demanding(None, 0, model), {}, {}) is None
