"""Checks of a model before it is traced; a refusal names the parameter and the remedy."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.errors import UnsupportedModelError

__all__ = ["check_model", "clear_marks", "is_marked", "model_dtype"]

_MARKS = (
    "is_quantized",
    "hf_quantizer",
    "quantization_method",
    "quantization_config",
    "_is_quantized",
    "_pre_quantization_dtype",
)
"""What transformers leaves on a model, or on its config, that it has loaded from quantised weights."""

_DEQUANTISE = "Load it in float32, bfloat16 or float16, or call model.dequantize() first"


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be pruned: a model without parameters, quantised, or spread over devices.

    Raises:
        UnsupportedModelError: names the parameter concerned and what to do.
    """
    named = list(model.named_parameters())
    if not named:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters", remedy="Pass a model with weights")
    if is_marked(model):
        _check_plain(model)
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


def is_marked(model: nn.Module) -> bool:
    """Whether a loader marked ``model`` as quantised; a file of quantised weights may have become floats since."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None


def clear_marks(model: nn.Module) -> None:
    """Take the marks of quantisation off ``model`` and its config, by which transformers would not save or train it."""
    for name in _MARKS:
        vars(model).pop(name, None)
        vars(getattr(model, "config", model)).pop(name, None)


def _check_plain(model: nn.Module) -> None:
    """Refuse a model marked as quantised in which weights are anything else than plain floats."""
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise UnsupportedModelError(
                f"a {type(parameter).__name__} is a quantised weight", where=name, remedy=_DEQUANTISE
            )
    for name, buffer in model.named_buffers():
        if buffer.dim() >= 2 and not buffer.dtype.is_floating_point and buffer.dtype != torch.bool:
            raise UnsupportedModelError(
                f"{buffer.dtype} of shape {tuple(buffer.shape)} in a model marked as quantised holds packed weights",
                where=name,
                remedy=_DEQUANTISE,
            )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype most parameters have, by number of elements."""
    count: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=lambda dtype: count[dtype])
