"""Which numbers of units may stay: multiples that hardware likes, and that devices can share."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm

from torch import fx

from fxprune.axes import unit_index
from fxprune.discovery.groups import Group
from fxprune.evaluation.widths import read_widths
from fxprune.graph.facts import add_note
from fxprune.graph.tensors import device_of

from .by_kind import as_pairs, of_kind

__all__ = ["AUTO", "Rounding"]

AUTO = "auto"
"""Widths are multiples of what was measured to be worth it on the device."""


@dataclass(frozen=True)
class Rounding:
    """Which numbers of units may stay where some go.

    Args:
        round_to: one number: widths of parameters are multiples of it. Numbers by kind: so many *units* of the kind,
            so 2 for ``head`` means an even number of heads whatever their width. The number of experts is no width.
        tensor_parallel: devices that share each layer. MLP channels, query heads and key/value heads of a layer are
            multiples of it; fewer key/value heads than devices are held by several each, and stay as they are.
    """

    round_to: int | tuple[tuple[str, int], ...] = 1
    tensor_parallel: int = 1

    @classmethod
    def on(
        cls, graph_module: fx.GraphModule, round_to: int | str | tuple[tuple[str, int], ...], tensor_parallel: int
    ) -> Rounding:
        """Return what was asked for, with what the device of the weights wants where that is ``auto``.

        Raises:
            ArgumentError: nothing was measured on the device.
        """
        if isinstance(round_to, str):
            widths = read_widths(device_of(graph_module))
            round_to = widths.best()
            add_note(graph_module, f"round_to={AUTO} is {round_to}, as measured on {widths.device}")
        return cls(round_to, tensor_parallel)

    def step(self, group: Group) -> int:
        """Return the number whose multiples may stay; at most the size of the group."""
        return min(lcm(self._rounded(group), self._shared(group)), group.size)

    def _rounded(self, group: Group) -> int:
        if as_pairs(self.round_to) is not None:
            return of_kind(self.round_to, group.kind, 1)
        if group.kind == "expert" or group.factor is None:
            return 1
        span = min(int((unit_index(m.expr, group.factor) == 0).sum()) for m in group.parameters)
        number = of_kind(self.round_to, group.kind, 1)
        return number // gcd(number, span)

    def _shared(self, group: Group) -> int:
        devices = self.tensor_parallel
        if group.kind == "mlp":
            return devices
        if group.kind != "head":
            return 1
        if group.outer is not None:
            return devices // gcd(devices, group.outer.size)
        return devices if group.size >= devices else group.size
