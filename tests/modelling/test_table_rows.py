"""Rows of tables that go into modules with fewer units."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.modelling.table_rows import select_inputs


class Add(nn.Module):
    """Adds a bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x if bias is None else x + bias


def test_what_is_no_table_goes_in_as_it_is() -> None:
    module = Add()
    select_inputs(module, {"bias": {"axis": 1, "of": 4, "kept": [0]}, "x": {"axis": 3, "of": 2, "kept": [0]}})
    x = torch.ones(2, 3)
    assert torch.equal(module(x), x), "no bias, and an input with fewer axes"
    assert torch.equal(module(x, torch.ones(1, 1)), x + 1), "one row for all"
