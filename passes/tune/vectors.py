"""Trained parameters of tuning: vectors, low-rank updates or weights, and where each is folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxprune.axes import factors
from fxprune.graph.tensors import device_of, get_tensor, weights
from fxprune.masking.masked_run import UntouchedRun
from fxprune.removal.removal import Removal
from fxprune.rules.products import LoneProduct, lone_products

__all__ = ["CAREFUL", "TunedRun", "TunedWeights", "Vectors", "Weights", "single_axes", "tuned_products"]

Parts: TypeAlias = Mapping[tuple[str, str], torch.Tensor]
"""Vectors by key."""

_REACH = 0.5
"""A scale stays between a half and one and a half: a unit is turned up or down, and never off."""

_SLIGHT = 0.05
"""What is added to weights grows a quarter as fast as parameters of one axis move: it has many more numbers to move by,
and at a fifth, twelve steps made a model worse on text that it does not learn from."""

_START = 0
"""Seed of the numbers that low-rank factors start from."""

CAREFUL = 0.2
"""Parameters of one axis move a fifth as fast as scales: what a norm multiplies, all of the stream behind it has. So do
weights that are learned themselves, each by its own size."""


@dataclass(frozen=True)
class Vectors:
    """Names and sizes of the vectors, which lie one after the other in one flat tensor of numbers, all 0 at first.

    Args:
        products: by node name, the products whose inputs or outputs are scaled.
        sizes: for each vector its key and size: ``in`` and ``out`` with the name of a product, ``own`` with that of a
            parameter of one axis; ``down`` and ``up`` with the name of a product for the two factors, ``(in, rank)``
            and ``(rank, out)``, of what is added to its weight.
        rank: of what is added to each weight; 0 where nothing is.
        units: for each product what a number of 1 in both factors adds to each element of its weight.
    """

    products: Mapping[str, LoneProduct]
    sizes: Mapping[tuple[str, str], int]
    rank: int = 0
    units: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, removal: Removal, everywhere: bool, rank: int = 0) -> Vectors:
        """Return the vectors of a slim graph.

        Args:
            graph_module: the slim graph.
            removal: what was removed from it.
            everywhere: scale the inputs and outputs of all products, not only of those that lost inputs.
            rank: of what is added to the weights of these products; 0 for nothing.
        """
        products = {product.node.name: product for product in tuned_products(graph_module, removal, everywhere)}
        sizes = {}
        for name, product in products.items():
            shape = get_tensor(graph_module, product.name).shape
            sizes["in", name] = shape[product.axis]
            if product.added is None or product.bias is not None:
                sizes["out", name] = shape[1 - product.axis]
            if rank:
                sizes["down", name] = shape[product.axis] * rank
                sizes["up", name] = shape[1 - product.axis] * rank
        sizes.update({("own", name): get_tensor(graph_module, name).numel() for name in single_axes(graph_module)})
        return cls(products, sizes, rank, {name: _unit(graph_module, p, rank) for name, p in products.items() if rank})

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(self.sizes.values())

    def begin(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        """Return the numbers at the start, all in one tensor."""
        return [torch.zeros(self.count, device=device_of(graph_module))]

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        """Return how fast each tensor of numbers moves, as a part of the rate of a scale."""
        return [1.0]

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> TunedRun:
        """Return an interpreter that runs the graph as if ``numbers`` were folded in."""
        return TunedRun(graph_module, self, *numbers)

    def parts(self, numbers: torch.Tensor) -> Parts:
        """Return each vector by its key, cut from ``numbers`` at once: one step back gives the gradient of them all."""
        return dict(zip(self.sizes, numbers.split(list(self.sizes.values())), strict=True))

    def scale(self, parts: Parts, key: tuple[str, str]) -> torch.Tensor | None:
        """Return what the vector ``key`` of a product multiplies by; None where there is none."""
        part = parts.get(key)
        return None if part is None else 1 + _REACH * torch.tanh(part)

    def factors(self, parts: Parts, node: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the two factors, ``(in, rank)`` and ``(rank, out)``, of what is added to a product's weight.

        The first starts at random numbers, the same each time, and the second at 0, so that nothing is added at first.
        """
        down, up = parts.get(("down", node)), parts.get(("up", node))
        if down is None or up is None:
            return None
        down = down.view(-1, self.rank)
        return self.units[node] * (_start(len(down), self.rank).to(down.device) + down), up.view(self.rank, -1)

    def moved(self, parts: Parts, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a parameter of one axis, moved in units of its root mean square."""
        part = parts.get(("own", name))
        if part is None:
            return value
        wide = value.float()
        return (wide + CAREFUL * wide.square().mean().sqrt() * part).to(value.dtype)

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the new value of each tensor that a vector is folded into."""
        (flat,) = numbers
        parts = self.parts(flat)
        values = {name: self.moved(parts, name, get_tensor(graph_module, name)) for _, name in self._own}
        for node, product in self.products.items():
            W = get_tensor(graph_module, product.name)
            wide, rows, columns = W.float(), self.scale(parts, ("out", node)), self.scale(parts, ("in", node))
            assert columns is not None
            wide = wide * (columns if product.axis == 1 else columns[:, None])
            if rows is not None:
                wide = wide * (rows[:, None] if product.axis == 1 else rows)
            low = self.factors(parts, node)
            if low is not None:
                added = low[0] @ low[1]
                wide = wide + (added.T if product.axis == 1 else added)
            values[product.name] = wide.to(W.dtype)
            if rows is not None and product.bias is not None:
                bias = values.get(product.bias, get_tensor(graph_module, product.bias))
                values[product.bias] = (bias.float() * rows).to(bias.dtype)
        yield from values.items()

    @property
    def _own(self) -> list[tuple[str, str]]:
        return [key for key in self.sizes if key[0] == "own"]


class TunedRun(UntouchedRun):
    """An interpreter that runs a graph as if the vectors were folded in; its weights themselves get no gradient.

    Args:
        graph_module: the slim graph.
        vectors: where what acts.
        numbers: the numbers that are learned.
    """

    def __init__(self, graph_module: fx.GraphModule, vectors: Vectors, numbers: torch.Tensor) -> None:
        super().__init__(graph_module)
        self.vectors, self.parts = vectors, vectors.parts(numbers)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight without its gradient; one of one axis moved."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        return self.vectors.moved(self.parts, str(target), value.detach())

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of ``n``; of a product, between its two scales."""
        product = self.vectors.products.get(n.name)
        if product is None:
            return super().run_node(n)
        source = self.env[product.source]
        self.env[product.source] = self._scaled(source, ("in", n.name))
        value = self._scaled(super().run_node(n), ("out", n.name))
        self.env[product.source] = source
        low = self.vectors.factors(self.parts, n.name)
        return value if low is None else value + source @ low[0].to(source.dtype) @ low[1].to(source.dtype)

    def _scaled(self, value: torch.Tensor, key: tuple[str, str]) -> torch.Tensor:
        scale = self.vectors.scale(self.parts, key)
        return value if scale is None else value * scale.to(value.dtype)


def _unit(graph_module: fx.GraphModule, product: LoneProduct, rank: int) -> float:
    """A part of the root mean square of a weight, shared by the ranks."""
    W = get_tensor(graph_module, product.name).detach().float()
    return float(_SLIGHT * W.square().mean().sqrt() / rank**0.5)


def tuned_products(graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> Iterator[LoneProduct]:
    """Yield the products that are tuned.

    Args:
        graph_module: the slim graph.
        removal: what was removed from it.
        everywhere: all whose weight nothing else reads, not only those that lost inputs.
    """
    for product in lone_products(graph_module):
        if everywhere or _lost_inputs(product, removal):
            yield product


def single_axes(graph_module: fx.GraphModule) -> Iterator[str]:
    """Yield the names of the parameters of one axis, such as those of norms and biases, that have no second name."""
    found = [(name, id(tensor)) for name, tensor in weights(graph_module) if _of_one_axis(tensor)]
    names = Counter(tensor for _, tensor in found)
    yield from (name for name, tensor in found if names[tensor] == 1)


def _of_one_axis(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dim() == 1 and tensor.is_floating_point()


@cache
def _start(rows: int, rank: int) -> torch.Tensor:
    """What a factor starts from, the same each time."""
    return torch.randn(rows, rank, generator=torch.Generator().manual_seed(_START))


def _lost_inputs(product: LoneProduct, removal: Removal) -> bool:
    exprs = removal.axes.tensors.get(product.name)
    return exprs is not None and any(removal.keep.touches(factor) for factor in factors(exprs[product.axis]))


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
