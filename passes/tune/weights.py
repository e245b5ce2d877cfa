"""The weights that tuning learns where it learns them all: which they are, and how the graph runs with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.graph.tensors import get_tensor
from fxprune.masking.masked_run import UntouchedRun
from fxprune.removal.removal import Removal

from .vectors import CAREFUL, single_axes, tuned_products

__all__ = ["TunedWeights", "Weights"]


@dataclass(frozen=True)
class Weights:
    """Names of the weights that are learned; the numbers are the weights themselves, in float32.

    Args:
        sizes: by name, how many numbers a weight has.
    """

    sizes: dict[str, int]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> Weights:
        """Return those of a slim graph: of products that nothing else reads, and all parameters of one axis.

        Args:
            graph_module: the slim graph.
            removal: what was removed from it.
            everywhere: the weights of all products, not only of those that lost inputs.
        """
        products = tuned_products(graph_module, removal, everywhere)
        names = dict.fromkeys([*(product.name for product in products), *single_axes(graph_module)])
        return cls({name: get_tensor(graph_module, name).numel() for name in names})

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(self.sizes.values())

    def begin(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        """Return the numbers at the start, one tensor a weight."""
        return [get_tensor(graph_module, name).detach().float().clone() for name in self.sizes]

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        """Return how fast each tensor of numbers moves, as a part of the rate of a scale: in units of its own size."""
        found = (get_tensor(graph_module, name).detach().float() for name in self.sizes)
        return [CAREFUL * float(weight.square().mean().sqrt()) for weight in found]

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> UntouchedRun:
        """Return an interpreter that runs the graph with ``numbers`` as its weights."""
        return TunedWeights(graph_module, dict(zip(self.sizes, numbers, strict=True)))

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the new value of each weight."""
        for name, value in zip(self.sizes, numbers, strict=True):
            yield name, value.to(get_tensor(graph_module, name).dtype)


class TunedWeights(UntouchedRun):
    """An interpreter that runs a graph with other weights; those of its own get no gradient.

    Args:
        graph_module: the slim graph.
        weights: by name, what is read in the place of a weight of the graph, in float32.
    """

    def __init__(self, graph_module: fx.GraphModule, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what is read in the place of a weight, in the weight's own type."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        learned = self.weights.get(str(target))
        return value.detach() if learned is None else learned.to(value.dtype)
