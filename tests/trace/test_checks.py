"""Models that cannot be pruned are refused before they are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import UnsupportedModelError
from fxprune.trace.inputs import check_model, clear_quantisation_marks, is_marked_quantised, model_dtype
from tests.models import tiny
from tests.oracle import Net


class Sub(nn.Parameter):
    """A subclass of Parameter."""


def quantised(**tensors: torch.Tensor) -> nn.Module:
    """A layer that is marked as quantised, with some tensors of its own."""
    module = nn.Linear(2, 2)
    module.is_quantized = True  # type: ignore[assignment]
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor) if name == "packed" else setattr(module, name, tensor)
    return module


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (quantised(packed=torch.zeros(2, 2, dtype=torch.int32)), "packed: torch.int32 of shape"),
        (quantised(weight=Sub(torch.ones(2, 2))), "weight: a Sub is a quantised weight"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_model(model)


def test_a_weight_of_no_tokens_is_no_shard() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat((m.first, m.none, m.a(x)[None]), 1)
        return m.b(tokens.relu())  # type: ignore[no-any-return]

    parts: dict[str, Any] = {"first": nn.Parameter(torch.ones(1, 1, 6)), "none": nn.Parameter(torch.ones(1, 0, 6))}
    net = Net(body, a=nn.Linear(3, 6), b=nn.Linear(6, 2), **parts)
    found = fxprune.prune(net, ratio=0.1, importance="l2", kinds=("mlp",), example_inputs={"x": torch.ones(4, 3)})
    assert found.graph_module.get_parameter("none").shape == (1, 0, 5)


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
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8), nn.LayerNorm(8))
    check_model(model)
    assert model_dtype(model) == torch.bfloat16
