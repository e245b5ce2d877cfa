"""Models that cannot be pruned are refused before they are traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import UnsupportedModelError
from fxprune.trace.checks import check_model, model_dtype


def two(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, second)


def marked(module: nn.Module) -> nn.Module:
    """A module that says it is quantised."""
    module.is_quantized = True  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.ReLU(), "ReLU has no parameters"),
        (marked(nn.Linear(2, 2)), "marked as quantised"),
        (
            nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)]),
            "0: dtype torch.int8",
        ),
        (two(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), r"1\.weight: is on meta while 0\.weight is on cpu"),
    ],
)
def test_what_cannot_be_pruned_is_named(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_model(model)


def test_the_dtype_of_a_model_is_that_of_most_elements() -> None:
    model = two(nn.Linear(8, 8, dtype=torch.bfloat16), two(nn.LayerNorm(8), nn.LayerNorm(8)))
    check_model(model)
    assert model_dtype(model) == torch.bfloat16
