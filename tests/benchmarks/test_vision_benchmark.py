"""The benchmark of models for images, on a small network of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import vision
from tests.oracle import Net


@pytest.mark.parametrize("norm", [False, True])
def test_both_tools_prune_a_network_and_are_compared_with_masking(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Any:
        torch.manual_seed(0)
        parts = {"first": nn.Conv2d(3, 20, 3), "second": nn.Conv2d(20, 25, 3), "out": nn.Linear(25, 1000)}
        body = lambda m, x: m.out(m.norm(m.second(m.first(x).relu()).mean((-1, -2))))  # noqa: E731
        net = Net(body, **parts, norm=nn.LayerNorm(25) if norm else nn.Identity())
        return net.eval(), torch.randn(2, 3, 8, 8)

    monkeypatch.setattr(vision, "make", make)
    ours, theirs = vision.ours("own/network"), vision.theirs("own/network")
    assert ours.exact and 0.65 < ours.parameters < 0.75
    assert theirs.exact is not norm and 0.65 < theirs.parameters < 0.9


def test_an_error_is_a_row() -> None:
    row = vision._work("timm/there is no such model", "ours")
    assert row.error and not row.exact
