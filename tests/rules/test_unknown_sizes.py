"""Sizes that depend on the data, and rules that fail, freeze axes instead of breaking discovery."""

from __future__ import annotations

import pytest
import torch

import fxprune
from fxprune.rules import registry
from tests.oracle import axes_of, discover, groups_of
from tests.rules.test_rules import Middle, between


@pytest.mark.parametrize(
    "middle",
    [lambda h: h * h.nonzero().shape[0], lambda h: h[h[..., 0] > 0], lambda h: h + h[h > 0].sum()],
    ids=["scalar", "rows", "mask"],
)
def test_discovery_survives_sizes_of_the_data(middle: Middle) -> None:
    assert {group.size for group in groups_of(discover(*between(middle)))} <= {12}


def test_a_rule_that_fails_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    assert [group.size for group in groups_of(discover(*between(torch.erf)))] == [12]

    @fxprune.rule("erf")
    def broken(op: fxprune.OpSite) -> None:
        raise IndexError("no such axis")

    dense = discover(*between(torch.erf))
    assert groups_of(dense) == () and "aten.erf.default" in axes_of(dense).unruled.values()
