"""How much memory passes take for sums over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import fx

from fxprune.graph.carrier import place_of
from fxprune.graph.tensors import weights
from fxprune.masking.cuts import Part, cut, numbers
from fxprune.pipeline.arguments import MEMORY, number, one_of

__all__ = ["allowed", "amount", "parts_within"]

_LOW = 0.1
"""Of the bytes of the weights."""

_SMALLER = (0.5, 0.25, 0.125)
"""Of what is allowed: parts as small as that are tried."""


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


def parts_within(
    memory: float | str, graph_module: fx.GraphModule, costs: Mapping[str, float], tokens: int
) -> list[Part]:
    """Return the parts of a graph whose sums fit into the memory allowed.

    With little memory those are taken with which a part, and what is kept of all samples where parts meet, take the
    least together.

    Args:
        memory: from :func:`amount`.
        graph_module: the graph.
        costs: bytes that are kept of each weight while its part runs, by name.
        tokens: of all samples.
    """
    limit = allowed(memory, graph_module, sum(costs.values()))
    found = cut(graph_module.graph, costs, limit)
    if isinstance(memory, float) or limit == math.inf:
        return found
    traced = max((numbers(node) for node in graph_module.graph.nodes if node.op == "placeholder"), default=1)
    scale = 4.0 * tokens / max(1, traced)

    def taken(parts: list[Part]) -> float:
        largest = max(sum(costs.get(name, 0.0) for name in set(part.reads)) for part in parts)
        return largest + scale * sum(numbers(node) for part in parts for node in part.gives)

    smaller = (cut(graph_module.graph, costs, limit * share) for share in _SMALLER)
    return min((found, *smaller), key=taken)
