"""A graph run with numbers at the places where units are taken in: all ones leave it as it is, a zero masks a unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.discovery.consumers import Consumer
from fxprune.masking.masked_run import UntouchedRun

__all__ = ["GatedRun", "spread_gates"]


class GatedRun(UntouchedRun):
    """An interpreter that multiplies what products take in; gradients go to these numbers and to no weight.

    Args:
        graph_module: the graph.
        gates: for each product that is gated, a number for each input: ``(in,)``.
    """

    def __init__(self, graph_module: fx.GraphModule, gates: Mapping[Consumer, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.gates: dict[fx.Node, list[tuple[Consumer, torch.Tensor]]] = {}
        for consumer, gate in gates.items():
            self.gates.setdefault(consumer.node, []).append((consumer, gate))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight that takes no gradient."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of ``n``; what a gated product takes in is multiplied for it alone."""
        if n not in self.gates:
            return super().run_node(n)
        before = {consumer.source: self.env[consumer.source] for consumer, _ in self.gates[n]}
        for consumer, gate in self.gates[n]:
            value = self.env[consumer.source]
            shaped = gate.view(-1, *[1] * (value.dim() - consumer.dim - 1))
            self.env[consumer.source] = value * shaped.to(value.dtype)
        found = super().run_node(n)
        self.env.update(before)
        return found


def spread_gates(gates: torch.Tensor, units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
    """Return the gate of each position: that of its unit, 1 where ``units`` has -1 for none.

    Args:
        gates: of all units, ``(units,)``.
        units: the unit of each position, ``(size,)``.
    """
    index = torch.from_numpy(np.where(units < 0, len(gates), units)).to(gates.device)
    return torch.cat((gates, gates.new_ones(1)))[index]
