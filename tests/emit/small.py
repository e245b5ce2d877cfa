"""A model of a few lines, whose widths follow from its config in the ways that matter to emission."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.layout import Rebuilder, block_rebuilder, find_layout

__all__ = ["SmallBlock", "SmallConfig", "SmallModel", "rebuilder", "small"]


class SmallConfig(PreTrainedConfig):
    """Widths of a small model; its head width follows from two others unless it is given."""

    model_type = "small"

    def __init__(self, hidden: int = 12, heads: int = 3, inner: int = 20, depth: int = 4, **more: Any) -> None:
        self.hidden, self.heads, self.inner, self.depth = hidden, heads, inner, depth
        self.head_dim = more.pop("head_dim", None)
        super().__init__(**more)


class SmallBlock(nn.Module):
    """Heads and channels beside each other; from a layer on, by the number of layers, without channels."""

    def __init__(self, config: SmallConfig, layer_idx: int) -> None:
        super().__init__()
        if config.inner % 2:
            raise ValueError(f"an odd width: {config.inner}")
        self.layer_idx, self.num_heads = layer_idx, config.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden // config.heads
        self.scale = self.head_dim**-0.5
        self.mix = nn.Linear(config.hidden, self.num_heads * self.head_dim, bias=False)
        self.back = nn.Linear(self.num_heads * self.head_dim, config.hidden, bias=False)
        self.up = nn.Linear(config.hidden, config.inner) if layer_idx < 3 else nn.Identity()
        self.down = nn.Linear(config.inner, config.hidden) if layer_idx < 3 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        apart = self.mix(x).view(*x.shape[:2], self.num_heads, self.head_dim) * self.scale
        return x + self.back(apart.flatten(2)) + self.down(torch.relu(self.up(x)))


class SmallModel(PreTrainedModel):
    config_class = SmallConfig

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(17, config.hidden)
        self.blocks = nn.ModuleList(SmallBlock(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.hidden)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def small(**fields: Any) -> SmallModel:
    return SmallModel(SmallConfig(**fields)).eval()


def rebuilder(model: SmallModel, index: int = 0) -> Rebuilder:
    """What builds a block of a model again."""
    found = block_rebuilder(model, "", find_layout(model).depth, index, model.blocks[index], {}, {})
    assert found is not None
    return found
