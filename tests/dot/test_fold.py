"""Blocks are the same by what is in them, whatever they are called and however wide they are."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import nn

from fxprune.discovery.dependency import dependency_graph
from fxprune.draw.atlas import Atlas, find_folds, numbered
from fxprune.trace import trace
from tests.models import tiny

WINDOW = "sliding_attention"


def graph_of(family: str, **sizes: object) -> nx.Graph:
    return dependency_graph(trace(tiny(family, **sizes), dynamic=False))


@pytest.mark.parametrize(
    ("family", "sizes", "numbers"),
    [
        ("llama", {}, [[0, 1, 2]]),
        ("gpt2", {}, [[0, 1, 2]]),
        (
            "gemma3_text",
            {"num_hidden_layers": 4, "layer_types": [WINDOW, WINDOW, "full_attention", WINDOW]},
            [[0, 1, 3], [2]],
        ),
        ("qwen2_moe", {"num_hidden_layers": 3}, [[0], [1, 2]]),
    ],
)
def test_blocks_that_differ_are_told_apart(family: str, sizes: dict[str, object], numbers: list[list[int]]) -> None:
    """A window, a mixture of experts: what is structure counts. The first and the last block are like the others."""
    folds = find_folds(Atlas(graph_of(family, **sizes)))
    assert [[int(block.rpartition(".")[2]) for block in fold.blocks] for fold in folds] == numbers


class Block(nn.Module):
    def __init__(self, width: int, extra: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).relu()
        return x + self.down(y.tanh() if self.extra else y)


class Stack(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_widths_may_differ_and_ops_may_not() -> None:
    stack = Stack(Block(5), Block(9), Block(7, extra=True), Block(8))
    folds = find_folds(Atlas(dependency_graph(trace(stack.eval(), {"x": torch.randn(2, 6)}))))
    assert [fold.blocks for fold in folds] == [("layers.0", "layers.1", "layers.3"), ("layers.2",)]
    assert folds[0].hidden == ("layers.1", "layers.3")
    (units,) = (row for row in folds[0].factors.values() if row[0].size == 5)
    assert [factor.size for factor in units] == [5, 9, 8]
    (row,) = (row for axis, row in folds[0].axes.items() if axis == ("layers.0.up.weight", 0))
    assert row == (("layers.0.up.weight", 0), ("layers.1.up.weight", 0), ("layers.3.up.weight", 0))


def test_blocks_are_named_in_short() -> None:
    among = [*(f"model.layers.{i}" for i in range(12)), "other.0", "other.1"]
    assert numbered(among[:12], among) == "model.layers.0 to 11"
    assert numbered(["model.layers.0", "model.layers.1", "model.layers.4"], among) == "model.layers.0 to 1, 4"
    assert numbered(among[11:], among) == "model.layers.11, other.0 to 1"
    assert numbered(["front"], ["front", "back"]) == "front"
