"""What a model has otherwise than its class builds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.blocks import CannotBuildError
from fxprune.modelling.layerwise import Overrides, apply_overrides, build_blocks
from fxprune.modelling.table_rows import INPUTS


class Block(nn.Module):
    """As wide as its config says."""

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx, self.more = layer_idx, getattr(config, "more", None)
        self.up = nn.Linear(2, config.width)


def config() -> PreTrainedConfig:
    """A config of two fields."""
    made = PreTrainedConfig()
    vars(made).update(width=4, more=1)
    return made


def model() -> nn.Module:
    """Three blocks."""
    made = nn.Module()
    made.blocks = nn.ModuleList(Block(config(), index) for index in range(3))
    return made


def test_a_block_that_cannot_be_built_is_named() -> None:
    made = model()
    made.blocks[0] = nn.Linear(2, 2)
    with pytest.raises(CannotBuildError, match=r"blocks\.0"):
        build_blocks(made, lambda _: config(), Overrides(block_fields={"blocks.0": {}}))


def test_attributes_shapes_and_inputs_are_set() -> None:
    made = nn.Module()
    made.norm, made.block = nn.LayerNorm(4), model().blocks[0]
    made.norm.register_buffer("table", torch.zeros(4), persistent=False)
    made.norm.weight.requires_grad_(False)
    inputs = {"block": {"x": {"axis": 0, "of": 2, "kept": [1]}}}
    overrides = Overrides(
        attributes={"norm": {"normalized_shape": [3], "eps": 0.1}},
        shapes={"norm.weight": [3]},
        buffers={"norm.table": [5]},
        inputs=inputs,
    )
    apply_overrides(made, overrides)
    assert made.norm.normalized_shape == (3,) and made.norm.eps == 0.1
    assert made.norm.weight.shape == (3,) and not made.norm.weight.requires_grad
    assert made.norm.table.shape == (5,) and "norm.table" in made.state_dict()
    assert vars(made.block)[INPUTS] == inputs["block"]
