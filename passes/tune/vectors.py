"""Trained parameters of tuning: vectors, low-rank updates or weights, and how each is folded into the weights."""

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

__all__ = ["Trained", "TrainedVectors", "TrainedWeights"]

Parts: TypeAlias = Mapping[tuple[str, str], torch.Tensor]
"""Vectors by key."""

_REACH = 0.5
"""A scale stays between a half and one and a half: a unit is never switched off."""

_SLIGHT = 0.05
"""Low-rank updates grow a quarter as fast as parameters of one axis move: they have many more numbers to move by, and
at a fifth, twelve steps made a model worse on text that it does not train on."""

_CAREFUL = 0.2
"""Parameters of one axis move a fifth as fast as scales: the scale of a norm multiplies all of the stream after it. So
do weights that are trained themselves, each in units of its own size."""


@dataclass(frozen=True)
class TrainedVectors:
    """Scales, offsets and low-rank updates, one after the other in one flat tensor of numbers, all 0 at first.

    Args:
        products: by node name, the products whose inputs or outputs are scaled.
        sizes: for each vector its key and size: ``in`` and ``out`` with the name of a product, ``own`` with that of a
            parameter of one axis; ``down`` and ``up`` with the name of a product for the two factors, ``(in, rank)``
            and ``(rank, out)``, of the update of its weight.
        units: for each product the change of each element of its weight by a number of 1 in both factors.
    """

    products: Mapping[str, LoneProduct]
    sizes: Mapping[tuple[str, str], int]
    rank: int = 0
    units: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, removal: Removal, everywhere: bool, rank: int = 0) -> TrainedVectors:
        """The vectors of a slim graph, for all products with ``everywhere``, else for those that lost inputs."""
        products = {product.node.name: product for product in _tuned_products(graph_module, removal, everywhere)}
        sizes, units = {}, {}
        for name, product in products.items():
            W = get_tensor(graph_module, product.name)
            sizes["in", name] = W.shape[product.axis]
            if product.added is None or product.bias is not None:
                sizes["out", name] = W.shape[1 - product.axis]
            if rank:
                sizes["down", name] = W.shape[product.axis] * rank
                sizes["up", name] = W.shape[1 - product.axis] * rank
                units[name] = float(_SLIGHT * W.detach().float().square().mean().sqrt() / rank**0.5)
        sizes.update({("own", name): get_tensor(graph_module, name).numel() for name in _single_axes(graph_module)})
        return cls(products, sizes, rank, units)

    @property
    def count(self) -> int:
        return sum(self.sizes.values())

    def initial(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        return [torch.zeros(self.count, device=device_of(graph_module))]

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        return [1.0]

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> VectorsRun:
        return VectorsRun(graph_module, self, *numbers)

    def parts(self, numbers: torch.Tensor) -> Parts:
        """Each vector by its key, split from ``numbers`` at once: one backward step gives the gradient of them all."""
        return dict(zip(self.sizes, numbers.split(list(self.sizes.values())), strict=True))

    def scale(self, parts: Parts, key: tuple[str, str]) -> torch.Tensor | None:
        """The scale by the vector ``key`` of a product; None if there is none."""
        part = parts.get(key)
        return None if part is None else 1 + _REACH * torch.tanh(part)

    def factors(self, parts: Parts, node: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The two factors, ``(in, rank)`` and ``(rank, out)``, of the update of a product's weight; None for none.

        The first starts at random numbers, the same each time, and the second at 0, so that the update is 0 at first.
        """
        down, up = parts.get(("down", node)), parts.get(("up", node))
        if down is None or up is None:
            return None
        down = down.view(-1, self.rank)
        return self.units[node] * (_start(len(down), self.rank).to(down.device) + down), up.view(self.rank, -1)

    def offset(self, parts: Parts, name: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter of one axis, moved in units of its root mean square."""
        part = parts.get(("own", name))
        if part is None:
            return value
        wide = value.float()
        return (wide + _CAREFUL * wide.square().mean().sqrt() * part).to(value.dtype)

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and the values of tensors that change; each product's weight is made when it is asked for."""
        (flat,) = numbers
        parts = self.parts(flat)
        single = [name for kind, name in self.sizes if kind == "own"]
        values = {name: self.offset(parts, name, get_tensor(graph_module, name)) for name in single}
        for node, product in self.products.items():
            W = get_tensor(graph_module, product.name)
            wide, rows, columns = W.float(), self.scale(parts, ("out", node)), self.scale(parts, ("in", node))
            assert columns is not None
            wide = wide * (columns if product.axis == 1 else columns[:, None])
            if rows is not None:
                wide = wide * (rows[:, None] if product.axis == 1 else rows)
            low = self.factors(parts, node)
            if low is not None:
                update = low[0] @ low[1]
                wide = wide + (update.T if product.axis == 1 else update)
            if rows is not None and product.bias is not None:
                bias = values.get(product.bias, get_tensor(graph_module, product.bias))
                values[product.bias] = (bias.float() * rows).to(bias.dtype)
            yield product.name, wide.to(W.dtype)
        yield from values.items()


class VectorsRun(UntouchedRun):
    """An interpreter that runs a graph as if the vectors were folded in; its weights get no gradient."""

    def __init__(self, graph_module: fx.GraphModule, vectors: TrainedVectors, numbers: torch.Tensor) -> None:
        super().__init__(graph_module)
        self.vectors, self.parts = vectors, vectors.parts(numbers)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        return self.vectors.offset(self.parts, str(target), value.detach())

    def run_node(self, n: fx.Node) -> Any:
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


@cache
def _start(rows: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, generator=torch.Generator().manual_seed(0))


def _tuned_products(graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> Iterator[LoneProduct]:
    """Yield the products with a weight that nothing else reads: all, or those that lost inputs."""
    for product in lone_products(graph_module):
        exprs = removal.axes.tensors.get(product.name)
        lost = exprs is not None and any(removal.keep.touches(factor) for factor in factors(exprs[product.axis]))
        if everywhere or lost:
            yield product


def _single_axes(graph_module: fx.GraphModule) -> Iterator[str]:
    """Yield the names of parameters of one axis, such as those of norms and biases, that have no second name."""
    found = [
        (name, id(tensor))
        for name, tensor in weights(graph_module)
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 1 and tensor.is_floating_point()
    ]
    names = Counter(tensor for _, tensor in found)
    yield from (name for name, tensor in found if names[tensor] == 1)


@dataclass(frozen=True)
class TrainedWeights:
    """Weights that are trained themselves, in float32: of each, by name, the number of its numbers."""

    sizes: dict[str, int]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> TrainedWeights:
        """The weights of products that nothing else reads, all or those that lost inputs, and one-axis parameters."""
        products = _tuned_products(graph_module, removal, everywhere)
        names = dict.fromkeys([*(product.name for product in products), *_single_axes(graph_module)])
        return cls({name: get_tensor(graph_module, name).numel() for name in names})

    @property
    def count(self) -> int:
        return sum(self.sizes.values())

    def initial(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        return [get_tensor(graph_module, name).detach().float().clone() for name in self.sizes]

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        found = (get_tensor(graph_module, name).detach().float() for name in self.sizes)
        return [_CAREFUL * float(weight.square().mean().sqrt()) for weight in found]

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> UntouchedRun:
        return WeightsRun(graph_module, dict(zip(self.sizes, numbers, strict=True)))

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in zip(self.sizes, numbers, strict=True):
            yield name, value.to(get_tensor(graph_module, name).dtype)


class WeightsRun(UntouchedRun):
    """An interpreter that runs a graph with other weights, in float32 and by name; its own get no gradient."""

    def __init__(self, graph_module: fx.GraphModule, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        replaced = self.weights.get(str(target))
        return value.detach() if replaced is None else replaced.to(value.dtype)


Trained: TypeAlias = TrainedVectors | TrainedWeights
