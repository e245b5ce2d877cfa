"""Inputs to trace with are made where they can be, and vary where they may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import TraceError
from fxprune.trace.inputs import default_inputs, dynamic_dims, is_hugging_face
from tests.models import tiny


def test_inputs_are_made_for_language_models_alone() -> None:
    model = tiny("llama", num_hidden_layers=1)
    assert is_hugging_face(model) and not is_hugging_face(nn.Linear(2, 2))
    made = default_inputs(model, None)
    assert list(made) == ["input_ids"] and made["input_ids"].shape == (2, 7) and made["input_ids"].dtype == torch.long
    given = {"x": torch.zeros(1)}
    assert default_inputs(model, given) == given
    with pytest.raises(TraceError, match=r"Linear.*example_inputs"):
        default_inputs(nn.Linear(2, 2), None)


def test_batch_and_sequence_may_vary_and_features_may_not() -> None:
    floats = {f"x{dims}": torch.zeros([3] * dims) for dims in (1, 2, 3, 4)}
    dims = dynamic_dims({**floats, "ids": torch.zeros(3, 3, 3, dtype=torch.long), "flag": True})
    free = {name: None if axes is None else list(axes) for name, axes in dims.items()}
    assert free == {"x1": [0], "x2": [0], "x3": [0, 1], "x4": [0], "ids": [0, 1], "flag": None}
