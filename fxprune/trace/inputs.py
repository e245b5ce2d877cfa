"""Inputs to trace with: made from the config of a Hugging Face model, or given by the caller."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxprune.errors import TraceError
from fxprune.graph.compat import tree_map

__all__ = ["blank", "default_inputs", "dynamic_dims", "free_axes", "is_hugging_face"]

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
        return _as_in_signature(model, given)
    if not is_hugging_face(model) or getattr(model, "main_input_name", "") != "input_ids":
        raise TraceError(
            f"cannot make inputs for {type(model).__name__}",
            where="example_inputs",
            remedy="Pass example_inputs={'name': tensor, ...}, the keyword arguments of its forward",
        )
    return {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long)}


def _as_in_signature(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs in the order in which ``forward`` takes them; a graph takes them in that order by position."""
    order = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}
    return dict(sorted(given.items(), key=lambda item: order.get(item[0], len(order))))


def free_axes(value: torch.Tensor) -> int:
    """Return how many leading axes of an input may vary, as far as the model allows it: batch, and sequence.

    Integers are tokens ``(batch, sequence)``; floats of three axes are ``(batch, sequence, width)``, others
    ``(batch, ...)``.
    """
    return min(value.dim(), 2 if not value.is_floating_point() or value.dim() == 3 else 1)


def dynamic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which axes of each tensor may vary, in the structure of ``inputs``."""
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> dict[int, Any] | None:
        return dict.fromkeys(range(free_axes(value)), auto) if isinstance(value, torch.Tensor) else None

    return {name: tree_map(free, value) for name, value in inputs.items()}


def blank(value: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    """Return zeros in place of a tensor, wherever tensors are made just now; anything else as it is.

    Args:
        value: an input of a model.
        own: the dtype of the weights of the model.
        dtype: what a tensor of that dtype gets.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(value.shape, dtype=dtype if value.dtype == own else value.dtype)
