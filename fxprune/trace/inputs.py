"""Inputs to trace with: made from the config of a Hugging Face model, or given by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxprune.errors import TraceError

__all__ = ["default_inputs", "dynamic_dims", "is_hugging_face"]

BATCH, TOKENS = 2, 7
"""``torch.export`` takes a size of 1 for a constant, and widths and numbers of heads are hardly ever multiples of 7."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers' models."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def default_inputs(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return keyword inputs to trace ``model`` with.

    Args:
        model: the model.
        given: the caller's inputs; None for a Hugging Face model, which gets ``input_ids`` of shape (2, 7).

    Raises:
        TraceError: no inputs were given for a model that is not a Hugging Face one.
    """
    if given is not None:
        return dict(given)
    if not is_hugging_face(model) or getattr(model, "main_input_name", "") != "input_ids":
        raise TraceError(
            f"cannot make inputs for {type(model).__name__}",
            remedy="Pass example_inputs={'name': tensor, ...}, the keyword arguments of its forward",
        )
    return {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long)}


def dynamic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which axes of each input may vary: batch and sequence, as far as the model allows it."""
    auto = torch.export.Dim.AUTO
    dims: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            dims[name] = None
            continue
        free = min(value.dim(), 2 if not value.is_floating_point() or value.dim() == 3 else 1)
        dims[name] = {axis: auto for axis in range(free)}
    return dims
