"""What tuning trains: vectors and low-rank updates, or the weights themselves, in memory or in files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx, nn

from fxprune.errors import CheckpointError
from fxprune.graph.tensors import device_of, get_tensor, weights
from fxprune.masking.masked_run import TrainingRun, UntouchedRun
from fxprune.offload.files import (
    cached_tensors,
    free_disk,
    offloaded,
    release_freed,
    require_cached_tensors,
    uncache,
    write_back,
    write_cached_tensors,
)
from fxprune.offload.prefetch import gathers_weights
from fxprune.offload.ranks import (
    all_reduce,
    barrier,
    broadcast_object,
    own_elements,
    rank,
    reduce_to_own,
    start_gather,
    world_size,
)
from fxprune.removal.removal import Removal
from fxprune.rules.products import LoneProduct, lone_products

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

    rate: ClassVar[float] = 0.005
    in_nats: ClassVar[bool] = False
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

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and the values of tensors that change; each product's weight is made when it is asked for."""
        run = self.run(graph_module, numbers)
        single = [name for kind, name in self.sizes if kind == "own"]
        values = {name: run.offset(name, get_tensor(graph_module, name)) for name in single}
        for node, product in self.products.items():
            W = get_tensor(graph_module, product.name)
            wide = W.float() if product.axis == 1 else W.float().T  # (out, in)
            wide = run.scaled(run.scaled(wide, ("in", node)).T, ("out", node)).T
            low = run.factors(node)
            wide = wide if low is None else wide + (low[0] @ low[1]).T
            if product.bias is not None:
                bias = values.get(product.bias, get_tensor(graph_module, product.bias))
                values[product.bias] = run.scaled(bias.float(), ("out", node)).to(bias.dtype)
            yield product.name, (wide if product.axis == 1 else wide.T).to(W.dtype)
        yield from values.items()


class VectorsRun(TrainingRun):
    """An interpreter that runs a graph as if the vectors were folded in; its weights get no gradient."""

    def __init__(self, graph_module: fx.GraphModule, vectors: TrainedVectors, numbers: torch.Tensor) -> None:
        super().__init__(graph_module)
        self.vectors = vectors
        # by key, split at once: one backward step gives the gradient of them all
        parts: Sequence[torch.Tensor] = numbers.split(list(vectors.sizes.values()))
        self.parts = dict(zip(vectors.sizes, parts, strict=True))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.offset(str(target), value.detach()) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        product = self.vectors.products.get(n.name)
        if product is None:
            return super().run_node(n)
        source = self.env[product.source]
        self.env[product.source] = self.scaled(source, ("in", n.name))
        value = self.scaled(super().run_node(n), ("out", n.name))
        self.env[product.source] = source
        low = self.factors(n.name)
        return value if low is None else value + source @ low[0].to(source.dtype) @ low[1].to(source.dtype)

    def scaled(self, value: torch.Tensor, key: tuple[str, str]) -> torch.Tensor:
        """A value whose last axis is scaled by the vector ``key``, if there is one."""
        part = self.parts.get(key)
        return value if part is None else value * (1 + _REACH * torch.tanh(part)).to(value.dtype)

    def factors(self, node: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The two factors, ``(in, rank)`` and ``(rank, out)``, of the update of a product's weight; None for none.

        The first starts at random numbers, the same each time, and the second at 0, so that the update is 0 at first.
        """
        down, up = self.parts.get(("down", node)), self.parts.get(("up", node))
        if down is None or up is None:
            return None
        rank, down = self.vectors.rank, down.view(-1, self.vectors.rank)
        return self.vectors.units[node] * (_start(len(down), rank).to(down.device) + down), up.view(rank, -1)

    def offset(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter of one axis, moved in units of its root mean square."""
        part = self.parts.get(("own", name))
        if part is None:
            return value
        wide = value.float()
        return (wide + _CAREFUL * wide.square().mean().sqrt() * part).to(value.dtype)


@cache
def _start(rows: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, generator=torch.Generator().manual_seed(0))


def _tuned_products(graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> Iterator[LoneProduct]:
    """Yield the products with a weight that nothing else reads: all, or those that lost inputs."""
    for product in lone_products(graph_module):
        if not isinstance(product, LoneProduct):
            continue
        exprs = removal.axes.tensors.get(product.name)
        lost = exprs is not None and removal.keep.touches(exprs[product.axis])
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
    """Weights that are trained themselves, in float32.

    Args:
        sizes: of each, by name, the number of its numbers.
        stored: those of them that are in files; None for none.
    """

    rate: ClassVar[float] = 0.008
    in_nats: ClassVar[bool] = True
    """Whether this is the rate for each nat of the divergence at the start, up to one."""

    sizes: dict[str, int]
    stored: StoredWeights | None = None

    @classmethod
    def of(cls, graph_module: fx.GraphModule, removal: Removal, everywhere: bool) -> TrainedWeights:
        """The weights of products that nothing else reads, all or those that lost inputs, and one-axis parameters."""
        products = _tuned_products(graph_module, removal, everywhere)
        names = dict.fromkeys([*(product.name for product in products), *_single_axes(graph_module)])
        return cls({name: get_tensor(graph_module, name).numel() for name in names})

    def in_files(self, graph_module: fx.GraphModule, rate: float) -> TrainedWeights:
        """The same weights, the large ones of them in files; ``rate`` is the highest learning rate."""
        large = {name: get_tensor(graph_module, name).detach() for name in self.sizes}
        large = {name: weight for name, weight in large.items() if weight.dim() > 1}
        return dataclasses.replace(self, stored=StoredWeights(large, rate))

    @property
    def count(self) -> int:
        return sum(self.sizes.values())

    @property
    def in_memory(self) -> list[str]:
        """The names of weights that are not in files."""
        return [name for name in self.sizes if self.stored is None or name not in self.stored.weights]

    def initial(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        return [get_tensor(graph_module, name).detach().float().clone() for name in self.in_memory]

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        return [_rate(get_tensor(graph_module, name)) for name in self.in_memory]

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> UntouchedRun:
        return WeightsRun(graph_module, dict(zip(self.in_memory, numbers, strict=True)), self.stored)

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        stored = () if self.stored is None else self.stored.kept()
        for name, value in chain(zip(self.in_memory, numbers, strict=True), stored):
            yield name, value.to(get_tensor(graph_module, name).dtype)


def _rate(weight: torch.Tensor) -> float:
    """The learning rate of a weight in units of that of all: it moves by a fraction of its root mean square."""
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)  # no copy of the weight, as squares are
    return _CAREFUL * float(norm / max(1, weight.numel()) ** 0.5)


class StoredWeights:
    """Weights that are trained in files, each updated as soon as its gradient is there.

    Where processes read weights together, each has a share of the elements of every weight, of its moments and of the
    best so far; gradients are reduced to these shares. Each weight is read at one place of the graph.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv
    1910.02054), section 5, for the shares.

    Args:
        weights: by name; those of less than :data:`~fxprune.offload.files.SMALLEST` bytes are left out.
        rate: the highest learning rate.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], rate: float) -> None:
        self._shared = gathers_weights()
        self.weights: dict[str, torch.Tensor] = {}
        """Whole weights; of those that are shared, the elements of other processes are not there."""
        self._own: dict[str, torch.Tensor] = {}
        self._adam: dict[str, torch.optim.Adam] = {}
        self._best: dict[str, torch.Tensor] = {}
        self._last: int | None = None
        self._counts = True
        for name, weight in weights.items():
            own = own_elements(weight.numel()) if self._shared else slice(None)
            wide = weight.float()
            whole = offloaded(wide, own)
            if whole is wide:
                continue
            share = whole.view(-1)[own]
            self.weights[name], self._own[name] = whole, share
            group = {"params": [share], "highest": rate * _rate(weight)}
            adam = self._adam[name] = torch.optim.Adam([group], fused=share.device.type == "cpu")
            moments = {moment: offloaded(torch.zeros_like(share)) for moment in ("exp_avg", "exp_avg_sq")}
            adam.state[share] = {"step": torch.zeros(()), **moments}

    def begin_step(self, factor: float, counts: bool) -> None:
        """Prepare for the gradients of a step.

        Args:
            factor: of the highest learning rate.
            counts: whether this process has samples in it.
        """
        self._counts = counts
        for adam in self._adam.values():
            adam.param_groups[0]["lr"] = adam.param_groups[0]["highest"] * factor

    def update(self, name: str, gradient: torch.Tensor) -> None:
        """Make a step of Adam with the gradient of a weight, in any dtype; none if it is not finite."""
        share, adam = self._own[name], self._adam[name]
        if self._shared:  # zeros that are reduced take no memory
            zeros = gradient.new_zeros(1).expand(gradient.numel())
            found = reduce_to_own(gradient if self._counts else zeros, share.dtype)
        else:
            found = (gradient if self._counts else torch.zeros_like(gradient)).reshape(-1).to(share.dtype)
            all_reduce([found])
        release_freed()
        if not bool(found.isfinite().all()):
            return
        share.grad = found
        adam.step()
        share.grad = None
        for tensor in (share, *adam.state[share].values()):
            write_back(tensor)

    def keep(self) -> None:
        """Remember the weights as they are as the best so far."""
        for name, share in self._own.items():
            if name in self._best:
                self._best[name].copy_(share)
                write_back(self._best[name])
            else:
                best = offloaded(share)
                self._best[name] = best.clone() if best is share else best

    def save(self, step: int) -> bool:
        """Write a checkpoint of a step to the cache; False if the disk has no room for it."""
        parts = [(f"{name}.{part}", value) for name in self._own for part, value in self._state(name).items()]
        needed = sum(value.nbytes for _, value in parts) * (world_size() if self._shared else 1)
        if not broadcast_object(needed <= free_disk()):
            return False
        for name, value in parts:
            write_cached_tensors(self._file(step, name), {"": value}, own=self._shared)
        barrier()
        return True

    def load(self, step: int) -> None:
        """Restore the checkpoint of a step."""
        for name in self._own:
            for part, value in self._state(name).items():
                file = self._file(step, f"{name}.{part}")
                with torch.no_grad():
                    value.copy_(require_cached_tensors(file, CheckpointError, own=self._shared)[""])
                write_back(value)
            best = cached_tensors(self._file(step, f"{name}.best"), own=self._shared)
            if best is not None:
                self._best[name] = offloaded(best[""])
        self._last = step

    def delete_previous(self, step: int) -> None:
        """Delete the checkpoint before that of ``step``, which is complete."""
        if self._last is not None:
            uncache(f"weights-{self._last}")
        self._last = step

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a weight's training, of the elements of this process."""
        share = self._own[name]
        best = {"best": self._best[name]} if name in self._best else {}
        return {"weight": share, **self._adam[name].state[share], **best}

    def _file(self, step: int, name: str) -> str:
        return f"weights-{step}/{rank() if self._shared else 0}/{name}.safetensors"

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name of each weight and the best so far, whole."""
        for name, best in self._best.items():
            whole = best
            if self._shared:
                whole = best.new_empty(self.weights[name].numel())
                whole[own_elements(len(whole))] = best
                whole = start_gather(whole)()
            yield name, whole.view(self.weights[name].shape)


class _Updated(torch.autograd.Function):
    """A weight whose gradient is taken where it is made, and goes no further.

    ``anchor`` is a tensor that requires a gradient, and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, weight: torch.Tensor, update: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.update = update
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.update(gradient)
        return None, None, None


class WeightsRun(TrainingRun):
    """An interpreter that runs a graph with other weights, in float32 and by name; its own get no gradient."""

    def __init__(
        self, graph_module: fx.GraphModule, weights: dict[str, torch.Tensor], stored: StoredWeights | None = None
    ) -> None:
        super().__init__(graph_module)
        self.weights, self.stored = weights, stored
        self._anchor = torch.zeros((), requires_grad=True)

    def fetch_attr(self, target: str) -> Any:
        found = None if self.stored is None else self.stored.weights.get(target)
        return super().fetch_attr(target) if found is None else found

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if name in self.weights:
            return self.weights[name].to(super().fetch_attr(name).dtype)
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if self.stored is None or name not in self.stored.weights:
            return value
        weight = super().fetch_attr(name)
        dtype, device = weight.dtype, weight.device.type
        # that in which a product reads the weight, so that under autocast its gradient takes no more bytes either
        if dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        value = value.to(dtype)
        if torch.is_grad_enabled():
            value = _Updated.apply(self._anchor, value, partial(self.stored.update, name))  # type: ignore[no-untyped-call]
        return value


Trained: TypeAlias = TrainedVectors | TrainedWeights
