"""Rows of tables that go into modules with fewer units."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxprune.modelling.table_rows import INPUTS, select_inputs


class Add(nn.Module):
    """Adds a bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The sum, or the input itself."""
        return x if bias is None else x + bias


@pytest.mark.parametrize("kept", [[0, 1], [2], [0, 2, 3], [1, 3]])
@pytest.mark.parametrize("samples", [1, 3])
def test_rows_are_those_that_an_index_selects(kept: list[int], samples: int) -> None:
    module = Add()
    select_inputs(module, {"bias": {"axis": 0, "of": 4, "kept": kept}})
    table = torch.randn(samples * 4, 2)
    want = table.view(samples, 4, 2)[:, kept].flatten(0, 1)
    zeros = torch.zeros_like(want)
    assert torch.equal(module(zeros, bias=table), want) and torch.equal(module(zeros, table), want)


def test_what_is_no_table_goes_in_as_it_is() -> None:
    module = Add()
    select_inputs(module, {"bias": {"axis": 1, "of": 4, "kept": [0]}, "x": {"axis": 3, "of": 2, "kept": [0]}})
    x = torch.ones(2, 3)
    assert torch.equal(module(x), x), "no bias, and an input with fewer axes"
    assert torch.equal(module(x, torch.ones(1, 1)), x + 1), "one row for all"


def test_a_module_holds_what_it_selects_and_so_does_its_copy() -> None:
    entries = {"bias": {"axis": 0, "of": 2, "kept": [1]}}
    module = nn.Sequential(Add())
    select_inputs(module[0], entries)
    twin = copy.deepcopy(module)[0]
    assert vars(twin)[INPUTS] == entries and vars(module[0])[INPUTS] is not entries
    assert torch.equal(twin(torch.zeros(1), torch.tensor([3.0, 4.0])), torch.tensor([4.0]))
