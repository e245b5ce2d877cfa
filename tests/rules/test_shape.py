"""Tests: rules of reshapes, permutations, concatenations, slices and diagonals."""

from __future__ import annotations

import pytest
import torch

from fxprune.rules.registry import find_rule
from fxprune.rules.shape import diagonal
from tests.rules.samples import Applied, call, x

aten = torch.ops.aten


@pytest.mark.parametrize(("offset", "text"), [(0, "self[a, b, b] -> out[a, b]"), (1, "keeps")])
def test_a_diagonal_ties_its_axes_if_it_is_the_main_one(offset: int, text: str) -> None:
    rule = find_rule(aten.diagonal.default)
    assert rule is not None and rule.state is diagonal
    assert text in Applied(call(aten.diagonal.default, x(2, 4, 4), offset, -2, -1)).text
