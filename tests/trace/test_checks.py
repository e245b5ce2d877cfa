"""Models that cannot be pruned are refused before they are traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import UnsupportedModelError
from fxprune.trace.checks import check_model, clear_quantisation_marks, is_marked_quantised, model_dtype
from tests.models import tiny


def two(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, second)


class Packed(nn.Linear):
    """A layer whose weights are packed into a buffer."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("packed", torch.zeros(2, 2, dtype=torch.int32))


class Sub(nn.Parameter):
    """A subclass of Parameter."""


class Wrapped(nn.Linear):
    """A layer whose weight is a subclass of Parameter."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight = Sub(self.weight.detach())


def marked(module: nn.Module) -> nn.Module:
    module.is_quantized = True  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.ReLU(), "ReLU: it has no parameters"),
        (marked(Packed()), "packed: torch.int32 of shape"),
        (marked(Wrapped()), "weight: a Sub is a quantised weight"),
        (
            nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)]),
            "0: dtype torch.int8",
        ),
        (two(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), r"1\.weight: is on meta while 0\.weight is on cpu"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_model(model)


def test_a_mark_alone_does_not_make_a_model_quantised() -> None:
    """A model read from a GGUF file is plain floats, and was once refused for its mark."""
    model = tiny("llama", num_hidden_layers=1)
    model.is_quantized, model.hf_quantizer = True, object()
    model.config.quantization_config = {"quant_method": "gguf"}
    check_model(model)
    assert is_marked_quantised(model)
    slim = fxprune.prune(model, importance="l2", protect=()).model
    assert not is_marked_quantised(slim) and "quantization_config" not in slim.config.to_dict()
    assert is_marked_quantised(model) and model.config.quantization_config
    clear_quantisation_marks(model)
    assert not is_marked_quantised(model)


def test_the_dtype_of_a_model_is_that_of_most_elements() -> None:
    model = two(nn.Linear(8, 8, dtype=torch.bfloat16), two(nn.LayerNorm(8), nn.LayerNorm(8)))
    check_model(model)
    assert model_dtype(model) == torch.bfloat16
