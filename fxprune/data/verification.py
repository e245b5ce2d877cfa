"""Inputs to verify with: the caller's, or random ones that fit a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import embedding_rows
from fxprune.graph.compat import is_free, size_hint
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import device_of

__all__ = ["VerificationInputs", "make_inputs"]

BATCH, TOKENS = 2, 16
"""Enough for a batch to be told from a single sample, and for positions to differ; no more than a moment's work."""


@dataclass(frozen=True, eq=False)
class VerificationInputs(Fact):
    """The inputs that the dense and the slim graph are compared on.

    Args:
        values: keyword inputs of the graph, in its order.
    """

    values: Mapping[str, torch.Tensor]


def make_inputs(graph_module: fx.GraphModule, given: Mapping[str, Any] | None, seed: int) -> dict[str, torch.Tensor]:
    """Return keyword inputs for a graph: the caller's, else random token ids ``(2, 16)`` or random floats.

    Args:
        graph_module: the graph; sizes that are not dynamic are kept.
        given: the caller's example inputs.
        seed: for the random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = embedding_rows(graph_module)
    device = device_of(graph_module)
    inputs: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if given is not None and isinstance(given.get(name), torch.Tensor):
            inputs[name] = given[name].to(device)
            continue
        wanted = (BATCH, TOKENS)
        shape = [
            wanted[i] if i < 2 and is_free(size) else size_hint(size) for i, size in enumerate(node.meta["val"].shape)
        ]
        dtype = node.meta["val"].dtype
        value = (
            torch.randn(shape, generator=generator)
            if dtype.is_floating_point
            else torch.randint(rows.get(name, 2), shape, generator=generator)
        )
        inputs[name] = value.to(device, dtype)
    return inputs
