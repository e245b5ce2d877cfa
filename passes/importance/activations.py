"""Gradients of weights from activations: what a product read, and the gradient of what it gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample
from fxprune.rules.aliasing import writes
from fxprune.rules.product import LoneProduct, lone_products

__all__ = ["Recorded", "recordable", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a product of activations with a weight read, and the gradients of what it gave, sample by sample.

    The gradient of the weight is the product of the two. It is never there as a whole: some rows of it are made at a
    time, for one sample after the other.

    Args:
        product: the product.
        read: by the number of the sample: ``(.., tokens, in)``.
        asked: by the number of the sample: ``(.., tokens, out)``; none where nothing was asked of the product.
    """

    product: LoneProduct
    read: dict[int, torch.Tensor] = field(default_factory=dict)
    asked: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, sample: int, read: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Take in what the product read and gave in a sample.

        Args:
            sample: its number.
            read: the activations.
            given: the product, of a weight that wants no gradient.

        Returns:
            What to go on with in place of the product, whose gradient is taken in where it arrives.
        """
        given = given if given.requires_grad else given.detach().requires_grad_()

        def receive(gradient: torch.Tensor) -> None:
            self.read[sample], self.asked[sample] = read.detach(), gradient

        given.register_hook(receive)
        return given

    def gradients(self, rows: slice) -> Iterator[torch.Tensor]:
        """Yield some rows of the gradient of the weight in float32, for each sample in which there is one."""
        for sample, gradient in self.asked.items():
            pair = gradient, self.read[sample]
            asked, read = (value.reshape(-1, value.shape[-1]).float() for value in pair)
            first, second = (asked, read) if self.product.axis == 1 else (read, asked)
            yield first[:, rows].T @ second

    def forget(self) -> None:
        """Drop what was taken in."""
        self.read.clear()
        self.asked.clear()


def recordable(graph_module: fx.GraphModule) -> dict[str, LoneProduct]:
    """Return the products whose weights may do without gradients of their own, by the name of the weight.

    There are none in a graph that writes to values: what a product read may be another value later on.
    """
    if any(writes(node) for node in graph_module.graph.nodes):
        return {}
    return {product.name: product for product in lone_products(graph_module)}


def tokens_of(samples: tuple[Sample, ...]) -> int:
    """Return how many tokens samples have together, or numbers of the largest input of each."""
    return sum(max(map(_numbers, sample.inputs.values()), default=0) for sample in samples)


def _numbers(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0
