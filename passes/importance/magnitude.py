"""Magnitude of the weights: needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.graph.tensors import get_tensor

from .base import ImportancePass, axis_sums

__all__ = ["L1ImportancePass", "L2ImportancePass"]


@dataclass(frozen=True, eq=False)
class _MagnitudePass(ImportancePass):
    power: ClassVar[int]

    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """``sum |w| ** power`` over each slice."""
        found = {}
        for name, axis in wanted:
            weight = get_tensor(graph_module, name).detach()
            found[name, axis] = axis_sums(weight.float().abs().pow_(self.power), axis)
        return found


@dataclass(frozen=True, eq=False)
class L1ImportancePass(_MagnitudePass):
    """A slice is worth the sum of the magnitudes of its weights."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1


@dataclass(frozen=True, eq=False)
class L2ImportancePass(_MagnitudePass):
    """A slice is worth the sum of the squares of its weights (as in the reference implementation, without root)."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2
