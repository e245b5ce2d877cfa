"""What a slim model takes over from the dense one: floats, flags and buffers that follow no width."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping

import torch
from torch import nn

from fxprune.emit.snapshot import is_number

__all__ = ["carry_over"]


def carry_over(dense: nn.Module, slim: nn.Module) -> None:
    """Give a slim model the floats, flags and plain tensors of the dense one: a scale does not follow a head's width.

    Buffers that the model adds to a finished block are added to a block that was built again.

    Args:
        dense: the dense model; not changed.
        slim: a model of the same class, built from other widths.
    """
    twins: dict[str, nn.Module] = dict(slim.named_modules())
    for path, module in dense.named_modules():
        twin = twins.get(path)
        if twin is not None:
            _add_buffers(module, twin)
            held = vars(twin)
            held.update({name: value for name, value in vars(module).items() if _is_kept(name, value, held)})


def _add_buffers(module: nn.Module, twin: nn.Module) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in (*twin._buffers, *twin._parameters):
            persistent = name not in module._non_persistent_buffers_set
            twin.register_buffer(name, torch.empty_like(buffer, device="meta"), persistent)


def _is_kept(name: str, value: object, there: Mapping[str, object]) -> bool:
    """Whether an attribute keeps its dense value beside the attributes that the slim module has."""
    if name == "training":
        return False
    if isinstance(value, torch.Tensor):
        return True
    if name not in there:
        return _is_portable(value)
    if name.startswith("_") or is_number(there[name]):
        return False
    return isinstance(value, float | bool | str) or value is None


def _is_portable(value: object) -> bool:
    """Whether an attribute that only the user's modules have is safe to carry over."""
    if isinstance(value, functools.partial):
        parts = (*value.args, *value.keywords.values())
        return inspect.isfunction(value.func) and not any(isinstance(part, nn.Module) for part in parts)
    return isinstance(value, float | bool | str)
