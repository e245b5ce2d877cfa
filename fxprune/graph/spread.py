"""Models whose weights are not all in one place: sharded over processes, offloaded, or on several devices.

What accelerate and torch leave on a module tells which it is; neither of them is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxprune.errors import UnsupportedModelError

__all__ = ["check_loaded", "check_together", "check_whole", "input_device", "is_sharded"]

_FOLDER = (
    "Prune the folder it was loaded from with fxprune.prune_checkpoint, which reads a part of the model at a time, "
    "or pass the model as it is without a device_map and before it is sharded"
)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of some weights alone."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def check_whole(model: nn.Module, remedy: str = _FOLDER) -> None:
    """Refuse a model that holds a part of its weights alone.

    Args:
        model: the model.
        remedy: which way to go instead.

    Raises:
        UnsupportedModelError: names the parameter or module.
    """
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            what = "its weights are sharded over processes (FSDP)"
            raise UnsupportedModelError(what, where=path or type(model).__name__, remedy=remedy)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            what = "it is sharded over processes (a DTensor)"
            raise UnsupportedModelError(what, where=name, remedy=remedy)
    for path, module in model.named_modules():
        own = next((name for name, value in module.named_parameters(recurse=False) if value.is_meta), None)
        if own is not None and any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise UnsupportedModelError(
                "a device_map has offloaded it, and it is there only while its layer runs",
                where=f"{path}.{own}" if path else own,
                remedy=remedy,
            )


def check_loaded(model: nn.Module, where: str) -> None:
    """Refuse a model to train that is not whole, or has no weights yet; one on several devices trains there.

    Args:
        model: the model.
        where: what it was passed as.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    check_whole(model, "Pass the whole model, which arguments={'fsdp': True} shards for training")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError("its weights are on meta", where=where, remedy="Load the weights first")


def check_together(model: nn.Module) -> None:
    """Refuse a model whose weights are on several devices.

    Raises:
        UnsupportedModelError: names the parameter.
    """
    named = list(model.named_parameters())
    first, device = named[0][0], named[0][1].device
    mapped = any(True for module in model.modules() for _ in _hooks(module))
    for name, parameter in named:
        if parameter.device != device:
            raise UnsupportedModelError(
                f"is on {parameter.device} while {first} is on {device}",
                where=name,
                remedy=_FOLDER if mapped else f"Move the whole model to one device, as in model.to({str(device)!r})",
            )


def input_device(model: nn.Module) -> torch.device | None:
    """Return where the inputs of a model go: to its first parameter, or where that is put when it is used.

    None where the model has no parameters.
    """
    first = next(model.parameters(), None)
    if first is None or not first.is_meta:
        return None if first is None else first.device
    places = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    place = next((place for place in places if isinstance(place, str | int | torch.device)), None)
    return first.device if place is None else torch.device(place)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, those in sequences too."""
    pending = [getattr(module, "_hf_hook", None)]
    while pending:
        hook = pending.pop(0)
        if hook is not None:
            yield hook
        pending.extend(getattr(hook, "hooks", ()))
