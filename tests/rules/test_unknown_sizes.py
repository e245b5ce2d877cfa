"""Sizes that depend on the data, and rules that fail, freeze axes instead of breaking discovery."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.rules.registry import register_rule

Middle = Callable[[torch.Tensor], torch.Tensor]


class Between(nn.Module):
    """``middle`` between two linears."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 12), middle, nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def hidden_groups(middle: Middle) -> list[fxprune.Group]:
    graph = fxprune.dependency_graph(fxprune.trace(Between(middle), {"x": torch.randn(4, 5)}))
    return [group for group in fxprune.find_groups(graph) if group.kind == "mlp"]


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h * h.nonzero().shape[0],
        lambda h: h[h[:, 0] > 0],
        lambda h: h + h[h > 0].sum(),
    ],
    ids=["scalar", "rows", "mask"],
)
def test_discovery_survives_sizes_of_the_data(middle: Middle) -> None:
    assert all(group.size == 12 for group in hidden_groups(middle))


def test_a_rule_that_fails_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.rules import registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    assert hidden_groups(torch.erf)

    def broken(op: fxprune.OpSite) -> None:
        raise IndexError("no such axis")

    register_rule("erf", broken)
    graph = fxprune.dependency_graph(fxprune.trace(Between(torch.erf), {"x": torch.randn(4, 5)}))
    assert not [group for group in fxprune.find_groups(graph) if group.kind == "mlp"]
    assert "aten.erf.default" in graph.graph["axes"].unruled.values()
