"""How much memory passes take for sums over samples."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from torch import fx

from fxprune.graph.carrier import place_of
from fxprune.graph.tensors import weights
from fxprune.pipeline.arguments import MEMORY, number, one_of

__all__ = ["allowed", "amount"]

_LOW = 0.1
"""Of the bytes of the weights."""


def amount(memory: Any) -> float | str:
    """Return the argument ``memory`` of a pass as it is used.

    Raises:
        ArgumentError: it is no number above 0.
        UnknownNameError: it is none of the words.
    """
    if isinstance(memory, str):
        one_of("memory", memory, MEMORY)
        return memory
    return number("memory", memory, above=0)


def allowed(memory: float | str, graph_module: fx.GraphModule, wanted: float) -> float:
    """Return the bytes that sums may take at a time; infinity where they all fit.

    Args:
        memory: from :func:`amount`.
        graph_module: whose weights the sums are about.
        wanted: the bytes of all of them.
    """
    total = float(sum(tensor.nbytes for _, tensor in weights(graph_module)))
    if not isinstance(memory, str):
        return memory * total
    fits = memory == "fast" or (memory == "auto" and 2 * wanted <= _free(place_of(graph_module)))
    return math.inf if fits else _LOW * total


def _free(device: torch.device) -> float:
    """Bytes that are free on a device, or for a device without a count of its own on the machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
