"""Inputs to verify with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxprune.calibration import embedding_rows
from fxprune.compat import is_free, size_hint
from fxprune.tensors import device_of

__all__ = ["make_probe"]

BATCH, TOKENS = 2, 16


def make_probe(graph_module: fx.GraphModule, given: Mapping[str, Any] | None, seed: int) -> dict[str, torch.Tensor]:
    """Keyword inputs for the graph: the caller's, or random token ids ``(2, 16)``, or random floats, else.

    Args:
        graph_module: the graph; sizes that are not dynamic are kept.
        given: the caller's example inputs.
        seed: for the random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = embedding_rows(graph_module)
    device = device_of(graph_module)
    probe: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if given is not None and isinstance(given.get(name), torch.Tensor):
            probe[name] = given[name].to(device)
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
        probe[name] = value.to(device, dtype)
    return probe
