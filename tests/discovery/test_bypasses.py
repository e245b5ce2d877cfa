"""Which blocks can go as a whole: those that only add to what comes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.discovery.dependency import find_bypasses

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """A linear layer, and what `step` makes of its input and output."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.inner, self.step = nn.Linear(6, 6), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x, self.inner(x).relu())


class Stack(nn.Module):
    """Two blocks between a layer that widens and one that reads out."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(5, 6), nn.ModuleList([Block(step), Block(step)]), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


# what a block makes of its input and of what it computes, and whether it can be gone around
STEPS: dict[str, tuple[Step, bool]] = {
    "sum": (lambda x, y: x + y, True),
    "sums-of-sums": (lambda x, y: (x + y) + y.cos(), True),
    "in-place": (lambda x, y: y.add_(x), True),
    "no-sum": (lambda x, y: y, False),
    "scaled": (lambda x, y: torch.add(y, x, alpha=2), False),
    "product": (lambda x, y: x * y, False),
    "twice-the-input": (lambda x, y: x + y + x, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_block_that_only_adds_can_be_gone_around(name: str) -> None:
    step, residual = STEPS[name]
    graph = fxprune.trace(Stack(step).eval(), {"x": torch.randn(2, 5)}).graph_module.graph
    found = find_bypasses(graph, ("blocks.0", "blocks.1"))
    assert sorted(found) == (["blocks.0", "blocks.1"] if residual else [])
    if residual:
        assert found["blocks.0"].source == "linear"
        assert found["blocks.0"].target == found["blocks.1"].source
