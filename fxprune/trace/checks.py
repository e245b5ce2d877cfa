"""Checks of a model before it is traced; a refusal names the parameter and the remedy."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.errors import UnsupportedModelError

__all__ = ["check_model", "model_dtype"]


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be pruned: a model without parameters, quantised, or spread over devices.

    Raises:
        UnsupportedModelError: names the parameter concerned and what to do.
    """
    named = list(model.named_parameters())
    if not named:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters", remedy="Pass a model with weights")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is marked as quantised",
            remedy="Load it in float32, bfloat16 or float16; after dequantisation clear is_quantized and hf_quantizer",
        )
    for name, parameter in named:
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            raise UnsupportedModelError(
                f"dtype {parameter.dtype} is a quantised format",
                where=name,
                remedy="Dequantise the model first",
            )
    first, device = named[0][0], named[0][1].device
    for name, parameter in named:
        if parameter.device != device:
            raise UnsupportedModelError(
                f"is on {parameter.device} while {first} is on {device}",
                where=name,
                remedy=f"Move the whole model to one device, as in model.to({str(device)!r})",
            )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype most parameters have, by number of elements."""
    count: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=lambda dtype: count[dtype])
