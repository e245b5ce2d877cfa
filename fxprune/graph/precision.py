"""In what precision products are computed while numbers are learned: half of it where the device does so itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxprune.errors import PassError
from fxprune.graph.carrier import place_of
from fxprune.graph.tensors import weights

__all__ = ["autocast", "has_bf16", "narrowed"]


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself, and not by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return True
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def narrowed(precision: str, graph_module: fx.GraphModule, trial: Callable[[], torch.Tensor], where: str) -> bool:
    """Whether products in runs of a graph are to be computed in bfloat16.

    Args:
        precision: ``float32`` for no; ``bf16``; or ``auto``, for where the device computes in it itself and the trial
            gives what is finite. Weights that are not all float32 stay what they are.
        graph_module: the graph.
        trial: runs it; called in a context in which products are narrow.
        where: the pass that asks.

    Raises:
        PassError: ``bf16`` was asked for, and an op of the graph refuses what comes of it.
    """
    device = place_of(graph_module)
    floats = [tensor.dtype for _, tensor in weights(graph_module) if tensor.is_floating_point()]
    if precision == "float32" or any(dtype != torch.float32 for dtype in floats):
        return False
    if precision == "auto" and not has_bf16(device):
        return False
    try:
        with torch.no_grad(), autocast(device, True):
            return bool(trial().isfinite().all())
    except torch.OutOfMemoryError:  # a RuntimeError, too; with float32 there would be less yet
        raise
    except RuntimeError as error:  # an op that takes two tensors of one type, of which one was narrowed
        if precision == "auto":
            return False
        raise PassError(
            f"an op refuses bfloat16: {error}", where=where, remedy="Leave precision out, or say float32"
        ) from error


def autocast(device: torch.device, narrow: bool) -> torch.autocast:
    """Return a context in which products, and nothing that needs more digits, are computed in bfloat16.

    Args:
        device: where they are computed.
        narrow: without, the context changes nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)
