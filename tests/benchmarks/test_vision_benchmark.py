"""The benchmark of models for images, on a small network of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import vision


class Network(nn.Module):
    """Two convolutions; a layer norm over the channels of the second if asked for."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 25, 3)
        self.norm = nn.LayerNorm(25) if norm else nn.Identity()
        self.out = nn.Linear(25, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(image).relu()).mean((-1, -2))
        return self.out(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", [False, True])
def test_both_tools_prune_a_network_and_are_compared_with_masking(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Any:
        torch.manual_seed(0)
        return Network(norm).eval(), torch.randn(2, 3, 8, 8)

    monkeypatch.setattr(vision, "make", make)
    ours, theirs = vision.ours("own/network"), vision.theirs("own/network")
    assert ours.exact and 0.65 < ours.parameters < 0.75
    assert theirs.exact is not norm and 0.65 < theirs.parameters < 0.9


def test_an_error_is_a_row() -> None:
    row = vision._work("timm/there is no such model", "ours")
    assert row.error and not row.exact
