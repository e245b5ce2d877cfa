"""Criteria from gradients: Taylor expansion of the loss, and the Fisher matrix of gates at units.

Source: Ma, Fang, Wang, "LLM-Pruner", NeurIPS 2023, section 3.2; equation numbers below are theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import Index
from fxprune.data.calibration import Calibration, Sample, batch_indices, batched, clear_sample_errors, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, Groups, bare_kind, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.compat import is_free
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import device_of, require_weights, weights
from fxprune.masking.masked_run import GatedRun, output_tensors, spread_gates
from fxprune.masking.objective import Objective, gives_classes, sample_loss
from fxprune.masking.parts import LOW_MEMORY, Hooks, Part, PartRuns
from fxprune.masking.teacher import batch_size, logits_use_bf16
from fxprune.offload.files import (
    cache_folder,
    cached_tensors,
    offloaded,
    require_cached_tensors,
    resume_scope,
    uncache,
    write_cached_tensors,
)
from fxprune.offload.prefetch import current_prefetcher, to_device
from fxprune.offload.ranks import all_reduce, barrier, check_enough, deal, world_size
from fxprune.pipeline.arguments import Memory, Order, Precision, argument
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.removal import Array, Scores
from fxprune.rules.products import LoneProduct, lone_products
from fxprune.rules.registry import regroups, writes, written_sources
from fxprune.trace.fidelity import require_gradients

from .base import PRECISION, ImportancePass, Positions, Shape, Wanted, axis_sums, memory_limit, parts_within
from .forward import ForwardImportancePass
from .reconstruction import costs_in_turn

Axes = Mapping[str, Mapping[int, Shape]]
"""The axes of each parameter that scores are wanted for, with the shape of the scores."""

_BLOCK = 2**20
"""Elements of a weight that are summed at a time if sums are not kept for all of them."""

_CACHED = 2**18
"""Elements of a gradient that are formed at a time on a CPU if only slice sums of it are kept."""

_KEPT = {"vector": 0, "first": 1, "second": 0, "mix": 2}
"""Float32 tensors of the size of a weight that each order keeps while samples arrive."""


def _on_gradient(output: torch.Tensor, receive: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Call a function with the gradient of a tensor when it arrives; return the tensor to continue with."""
    output = output if output.requires_grad else output.detach().requires_grad_()
    output.register_hook(receive)
    return output


def _gradient_factors(
    product: LoneProduct, inputs: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a weight as ``first.T @ second``, ``(tokens, rows)`` and ``(tokens, columns)``.

    ``inputs`` are those of the product, ``gradient`` is that of its outputs.
    """
    read, given = (value.reshape(-1, value.shape[-1]) for value in (inputs, gradient))
    return (given, read) if product.axis == 1 else (read, given)


def recordable_products(graph_module: fx.GraphModule) -> dict[str, LoneProduct]:
    """Products whose weights can do without gradients of their own, by name of the weight.

    There are none in a graph that writes to values: the input of a product may be overwritten later.
    """
    if any(writes(node) for node in graph_module.graph.nodes):
        return {}
    return {product.name: product for product in lone_products(graph_module) if isinstance(product, LoneProduct)}


def count_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all samples: elements of the largest input of each."""
    sizes = ([v.numel() for v in sample.inputs.values() if isinstance(v, torch.Tensor)] for sample in samples)
    return sum(max(each, default=0) for each in sizes)


def _is_by_sample(product: LoneProduct) -> bool:
    """Whether the rows of the inputs of a product are those of one sample after the other."""
    source = product.source
    graph = source.graph
    given = next(node for node in graph.nodes if node.op == "placeholder" and node.meta["val"].dim()).meta["val"]
    while source.meta["val"].dim() == 2 and regroups(source):
        source = source.all_input_nodes[0]  # in row-major order
    value = source.meta["val"]
    return bool(value.dim() > 2 and is_free(value.shape[0]) and value.shape[0].node.expr == given.shape[0].node.expr)


@dataclass
class _Sums:
    """Sums over samples ``s`` that scores are made of, by name of the weight.

    For ``vector`` and ``second`` these are slice sums of ``w * g_s`` or of ``w * g_s ** 2 * w`` for each axis, and
    nothing is kept by element; for the others, gradients by element, and for ``mix`` their squares.
    """

    order: Order
    axes: Axes
    samples: int
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        kept = self.kept.get(name)
        if not _KEPT[self.order]:
            value = weight * gradient if self.order == "vector" else (weight * gradient).square_()
            parts = [axis_sums(value, axis, shape) / self.samples for axis, shape in self.axes[name].items()]
            self.kept[name] = parts if kept is None else [a + b for a, b in zip(kept, parts, strict=True)]
        elif kept is None:
            self.kept[name] = [gradient.clone(), *([gradient.square()] if self.order == "mix" else ())]
        else:
            kept[0].add_(gradient)
            for squares in kept[1:]:
                squares.addcmul_(gradient, gradient)  # without a temporary for the square

    def add_product(
        self, product: LoneProduct, weight: torch.Tensor, inputs: torch.Tensor, batch: int, given: torch.Tensor
    ) -> None:
        """Add the gradients of the weight of a product for each sample of a batch; only slice sums of them are kept.

        They are formed for some rows at a time, which a processor holds in its cache, in the dtype of the weight.

        Args:
            inputs: those of the product: of one sample after the other, of as many tokens each.
            given: the gradient of its outputs.
        """
        first, second = _gradient_factors(product, inputs.to(weight.dtype), given.to(weight.dtype))
        pairs = list(zip(first.chunk(batch), second.chunk(batch), strict=True))
        step = max(1, _CACHED // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
        sums = [torch.zeros(size, device=weight.device) for size in weight.shape]
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            value = self._times(weight[rows], [(a[:, rows].T @ b).float() for a, b in pairs])
            sums[0][rows] = value.sum(1)
            sums[1] += value.sum(0)
        self._add_sums(product.name, sums)

    def add_bias(self, name: str, bias: torch.Tensor, batch: int, given: torch.Tensor) -> None:
        """Add the gradients of the bias of a product for each sample of a batch, from that of its outputs."""
        rows = given.reshape(-1, given.shape[-1]).float().chunk(batch)
        self._add_sums(name, [self._times(bias, [one.sum(0) for one in rows])])

    def _times(self, weight: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum over the samples of what counts for each element, from gradients that are overwritten."""
        total, *others = gradients if self.order == "vector" else [one.square_() for one in gradients]
        for other in others:
            total.add_(other)
        return total.mul_(weight.float() if self.order == "vector" else weight.float().square())

    def _add_sums(self, name: str, sums: Sequence[torch.Tensor]) -> None:
        kept = self.kept.setdefault(name, [torch.zeros_like(sums[axis]) for axis in self.axes[name]])
        for axis, one in zip(self.axes[name], kept, strict=True):
            one += sums[axis] / self.samples

    def all_reduce(self) -> None:
        all_reduce(tensor for name in sorted(self.kept) for tensor in self.kept[name])

    def finish(self, name: str, weight: torch.Tensor) -> Positions:
        """The slice scores of a weight, or of some rows of it, whose sums are freed; none if no loss reads it."""
        kept, axes = self.kept.pop(name, ()), self.axes[name]
        if not kept:
            return {}
        if not _KEPT[self.order]:
            return {(name, axis): sums.abs() for axis, sums in zip(axes, kept, strict=True)}
        w, means = weight.detach().float(), [sums.div_(self.samples) for sums in kept]
        change = means[0] if self.order == "first" else means[0] - means[1].mul_(w).mul_(0.5)
        saliency = (w * change).abs_()
        return {(name, axis): axis_sums(saliency, axis, shape) for axis, shape in axes.items()}

    def by_rows(
        self, name: str, weight: torch.Tensor, gradients: Callable[[slice], Iterable[torch.Tensor]]
    ) -> Positions:
        """The slice scores of one weight, from sums for some rows at a time of each sample's ``gradients``."""
        found: Positions = {}
        block = _BLOCK if world_size() == 1 else 8 * _BLOCK  # a call costs as much as some megabytes on the link
        step = max(1, block // max(1, weight[:1].numel()))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            values = weight[rows].detach().float()
            # all processes reduce the same tensors, whether gradients arrive in each of them or not
            self.kept[name] = [torch.zeros_like(values) for _ in range(_KEPT[self.order])]
            for gradient in gradients(rows):
                self.add(name, values, gradient)
            self.all_reduce()
            for place, part in self.finish(name, values).items():
                before = found.get(place)
                by_row = place[1] == 0 or part.dim() == 2
                joined = part if before is None else torch.cat((before, part)) if by_row else before + part
                found[place] = joined
        return found


@dataclass(frozen=True, eq=False)
class TaylorImportancePass(ImportancePass):
    """Scores units by the expected change of the loss when they are removed.

    With weight ``w``, its gradient ``g`` (mean over samples) and the diagonal of the Fisher matrix ``h`` (mean over
    samples of the squared per-sample gradient), the score of a slice is, over its elements::

        vector    | sum w * g |                     equation 3, first term, for the slice as one vector
        first     sum | w * g |                     equation 4, for each element
        second    sum | w * h * w |
        mix       sum | w * g - 1/2 * w * h * w |   equation 5

    Gradients come one sample at a time and are turned into slice sums as they arrive. ``vector`` and ``second`` are
    linear in what arrives, so nothing is kept. ``first`` and ``mix`` take an absolute value per element and need sums
    of gradients. If ``memory`` does not hold them all, the graph runs in parts, each for all samples, which takes one
    more forward run and gives the same scores. With few samples the inputs of a product and the gradients of its
    outputs are smaller than those sums: then they are kept, and sums are formed for some rows of a weight at a time.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Calibration, Runnable)
    preconditions = (require_weights, require_gradients)
    prefetches: ClassVar[bool] = True

    order: Order = argument("mix", "Order of the expansion: ``vector``, ``first``, ``second`` or ``mix``.")
    memory: float | Memory = argument(
        "auto",
        """Memory for sums of gradients: ``fast`` keeps all of them at once; ``low`` takes as little as possible, at
        most a tenth of the bytes of the weights, or what the sums of the largest weight need; ``auto`` is ``fast`` if
        that fits into half the free memory, else ``low``; or a fraction of the bytes of all weights. ``mix`` keeps two
        float32 numbers for each weight, ``first`` one.""",
        check=memory_limit,
    )
    samples: int | None = argument(None, "Calibration samples, evenly spread; None for all.", least=1)
    precision: Precision = argument("float32", PRECISION)
    batch: int = argument(
        1,
        """Samples that run at once. Their gradients stay apart: for ``vector`` and ``second``, where the loss is that
        of next tokens and every scored weight is in a product whose rows belong to one sample each, or is a bias there;
        else they run one by one.""",
        least=1,
    )
    channel_samples: int | None = argument(
        None,
        """Samples for residual width beside other kinds, over which its scores settle sooner: each is a sum over nearly
        all weights, and takes as long as the scores of all other kinds. None for all.""",
        least=1,
    )

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        kinds = {*map(bare_kind, self.kinds)}
        again = min(self.channel_samples or 0, samples) if "channel" in kinds and len(kinds) > 1 else 0
        sums = LOW_MEMORY if self.memory == "low" and _KEPT[self.order] else _KEPT[self.order]
        sums += 0.0 if self.precision == "float32" else 0.5
        runs = 3.0 * (taken + again)
        return PassCost(runs=runs, batch=min(self.batch, taken), backward=True, outputs=3, weights=sums)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        channels = tuple(group for group in groups if group.kind == "channel")
        others = tuple(group for group in groups if group.kind != "channel")
        if self.channel_samples is None or not channels or not others:
            return super().score(graph_module, groups)
        found = super().score(graph_module, others)
        with resume_scope("channels"):
            again = replace(self, samples=self.channel_samples, channel_samples=None).score(graph_module, channels)
        units = {**found.units, **again.units}
        return Scores({group.name: units[group.name] for group in groups})

    def positions(self, graph_module: fx.GraphModule, wanted: Wanted) -> Positions:
        axes: dict[str, dict[int, Shape]] = {}
        for (name, axis), shape in wanted.items():
            axes.setdefault(name, {})[axis] = shape
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        tokens, tensors, kept = count_tokens(samples), dict(weights(graph_module)), _KEPT[self.order]
        bf16 = logits_use_bf16(self.precision, graph_module, samples[0], self.name)
        # bytes kept for each weight, itself included if it is prefetched
        costs = {name: 4.0 * (max(kept, 1) if self.memory == "low" else kept) * tensors[name].numel() for name in axes}
        recorded: dict[str, LoneProduct] = {}
        products = recordable_products(graph_module) if kept or bf16 or self.batch > 1 else {}
        for name, product in products.items() if kept else ():
            activations = 4.0 * tokens * sum(tensors[name].shape)
            if activations < costs.get(name, 0.0):
                recorded[name], costs[name] = product, activations
        if current_prefetcher() is not None:
            stored = 1.5 if bf16 else 1.0
            costs = {name: costs.get(name, 0.0) + stored * tensor.nbytes for name, tensor in tensors.items()}
        parts = parts_within(self.memory, graph_module, costs, tokens)
        # of a weight that no loss reads, as of a layer behind the one that is used
        zeros = {place: torch.zeros(shape) for place, shape in wanted.items()}
        batches = self._batches(graph_module, samples, axes, products.values())
        sweep = _GradientSweep(graph_module, batches, axes, self.order, parts, products, recorded, bf16=bf16)
        return zeros | sweep.run()

    def _batches(
        self, graph_module: fx.GraphModule, samples: Sequence[Sample], axes: Axes, products: Iterable[LoneProduct]
    ) -> list[list[Sample]]:
        """The samples that run at once: one, unless :attr:`batch` allows more."""
        objective = facts_of(graph_module).get(Objective) or Objective()
        size = 1 if _KEPT[self.order] else batch_size(graph_module, samples, self.batch)
        next_token = objective.next_token and all(sample.labels.numel() for sample in samples)
        if size > 1 and next_token and objective.own is None and gives_classes(graph_module):
            apart = [one for one in products if _is_by_sample(one)]
            if axes.keys() <= {name for one in apart if one.name in axes for name in (one.name, one.bias)}:
                numbers = batch_indices(samples, graph_module, size)
                return [[samples[i] for i in together] for together in numbers]
        return [[sample] for sample in samples]


class _GradientSweep:
    """Batches of samples forward and back, part by part; each gradient is added to sums as it arrives, and freed.

    The graph runs on detached aliases of its parameters, so that the caller's ``.grad`` stays as it is; tied names
    share one alias, whose gradient is then that of all its uses. Weights and inputs that are written to are copied.
    The gradients of a weight that several parts read are summed for each batch before they count. In bfloat16, a
    weight of one product is cast once for all samples of a part; there, and in batches of several samples, its gradient
    is never formed as a whole where nothing is kept by element; nor is that of a recorded product, of which some rows
    are computed at a time, for one sample after the other.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: Sequence[Sequence[Sample]],
        axes: Axes,
        order: Order,
        parts: Sequence[Part],
        products: Mapping[str, LoneProduct],
        recorded: Mapping[str, LoneProduct],
        *,
        bf16: bool = False,
    ) -> None:
        self.graph_module, self.total, self.order = graph_module, sum(map(len, batches)), order
        check_enough(batches)
        self.numbers = deal(range(len(batches)))
        """Of the batches of this process, among those of all."""
        self.batches = [batches[number] for number in self.numbers]
        self.sizes = [len(batch) for batch in batches]
        self.saved: int | None = None
        """The last part that was saved."""
        self.parts, self.axes, self.home = parts, axes, device_of(graph_module)
        self.written = written_sources(graph_module.graph)
        tensors = dict(weights(graph_module))
        names = {id(tensors[name]): name for name in axes}
        self.wanted = {name: names[id(t)] for name, t in tensors.items() if id(t) in names}
        self.reads = [{self.wanted[name] for name in part.reads if name in self.wanted} for part in parts]
        self.recorded = recorded
        self.pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in recorded}
        """Inputs of the product of each recorded weight, and gradients of its outputs; none without a loss."""
        self.narrow: dict[str, torch.Tensor] = {}
        """Weights of the running part in bfloat16, by name."""
        at_once = bf16 or self.total > len(batches)
        self.cast = set(products) if bf16 else set()
        """Weights that are cast once for all samples of a part."""
        self.summed = [one for one in products.values() if at_once and one.name in axes and not _KEPT[order]]
        """Products whose weights, and biases, have gradients that become slice sums at once."""
        self.apart = {name for one in self.summed for name in (one.name, one.bias)}
        """The names of these."""
        self.late: dict[tuple[str, int], torch.Tensor] = {}
        """By weight and batch: the gradient from later parts of a weight that an earlier part reads too."""
        inputs = [
            {
                name: value.to(self.home, copy=name in self.written) if isinstance(value, torch.Tensor) else value
                for name, value in batched(batch, graph_module).items()
            }
            for batch in self.batches
        ]
        self.runs = PartRuns(graph_module, parts, inputs, self.wanted, bf16=bf16)

    def run(self) -> Positions:
        left, found = self._resume()
        count = max(2 * left - 1, 0) * len(self.batches)
        for done in tracked(self._steps(left), "gradients", count):
            found.update(done)
        return found

    def _steps(self, left: int) -> Iterator[Positions]:
        """Run the first ``left`` parts; after each batch, yield the scores that are complete."""
        for part in self.parts[: max(left - 1, 0)]:
            for _ in self.runs.forward(part):
                yield {}
        for number, part in reversed(list(enumerate(self.parts[:left]))):
            if not self.runs.needs_gradients(part):
                yield from [{}] * len(self.batches)
                continue
            before = set[str]().union(*self.reads[:number])
            mine = {name: self.axes[name] for name in self.axes if name in self.reads[number] - before}
            records = [self.recorded[name] for name in mine if name in self.recorded]
            summed = {name: mine[name] for name in mine if name not in self.recorded}
            sums = _Sums(self.order, summed, self.total)
            watch = partial(self._hooks, records, sums)
            self.narrow.clear()
            for batch in self.runs.backward(part, partial(self._aliases, part, sums), self._loss, watch):
                if batch < len(self.batches) - 1:
                    yield {}
            found = self._scores(sums, records)
            self._save(number, found)
            yield found

    def _aliases(self, part: Part, sums: _Sums, batch: int) -> dict[str, torch.Tensor]:
        shared: dict[int, torch.Tensor] = {}
        for name in part.reads:
            tensor = self.runs.tensor(name)
            if id(tensor) not in shared:
                alias = tensor.detach().clone() if name in self.written else self._read(name)
                if name in self.wanted and name not in self.recorded and name not in self.apart:
                    alias.requires_grad_().register_post_accumulate_grad_hook(
                        partial(self._receive, self.wanted[name], sums, batch)
                    )
                shared[id(tensor)] = alias
        return {name: shared[id(self.runs.tensor(name))] for name in part.reads}

    def _read(self, name: str) -> torch.Tensor:
        """A weight that is not written to, as its products read it."""
        if name not in self.cast:
            return self.runs.tensor(name).detach()
        if name not in self.narrow:
            self.narrow[name] = self.runs.tensor(name).detach().to(torch.bfloat16)
        return self.narrow[name].detach()

    def _receive(self, name: str, sums: _Sums, batch: int, alias: torch.Tensor) -> None:
        """Add the gradient of a weight to the sums; keep it if an earlier part reads the weight too."""
        gradient, alias.grad = alias.grad, None
        assert gradient is not None
        late = self.late.pop((name, batch), None)
        whole = gradient.float() if late is None else gradient.float() + to_device(late, gradient.device)
        if name in sums.axes:
            sums.add(name, alias.detach().float(), whole)
        else:
            self.late[name, batch] = offloaded(to_device(whole, self.home))

    def _hooks(self, records: Sequence[LoneProduct], sums: _Sums, batch: int) -> Hooks:
        count = len(self.batches[batch])

        def add(product: LoneProduct, value: torch.Tensor) -> torch.Tensor:
            inputs = self.runs.value(product.source).detach()
            weight, bias = self._read(product.name), product.bias

            def receive(given: torch.Tensor) -> None:
                sums.add_product(product, weight, inputs, count, given)
                if bias is not None and bias in sums.axes:
                    sums.add_bias(bias, self.runs.tensor(bias).detach(), count, given)

            return _on_gradient(value, receive)

        added = {one.node: partial(add, one) for one in self.summed if one.name in sums.axes}
        return added | {product.node: partial(self._record, product) for product in records}

    def _record(self, product: LoneProduct, output: torch.Tensor) -> torch.Tensor:
        """Record inputs now, and the gradient of ``output`` when it arrives; return the tensor to continue with."""
        inputs = self.runs.value(product.source).detach()
        return _on_gradient(output, lambda gradient: self.pairs[product.name].append((inputs, gradient)))

    def _weight_gradients(self, product: LoneProduct, rows: slice) -> Iterator[torch.Tensor]:
        """Yield some rows of the gradient of a recorded weight in float32, for each sample that has one."""
        for pair in self.pairs[product.name]:
            first, second = _gradient_factors(product, *(value.float() for value in pair))
            yield first[:, rows].T @ second

    def _scores(self, sums: _Sums, records: Sequence[LoneProduct]) -> Positions:
        """The scores of weights that no earlier part reads."""
        for name, batch in [key for key in self.late if key[0] in sums.axes]:  # this part reads only its dtype
            weight = self.runs.tensor(name).detach().float()
            sums.add(name, weight, to_device(self.late.pop((name, batch)), weight.device))
        sums.all_reduce()
        found: Positions = {}
        for name in sums.axes:
            found |= sums.finish(name, self.runs.tensor(name))
        for product in records:
            name = product.name
            rows = _Sums(self.order, {name: self.axes[name]}, self.total)
            found |= rows.by_rows(name, self.runs.tensor(name), partial(self._weight_gradients, product))
            self.pairs[name].clear()
        return {place: to_device(value, self.home) for place, value in found.items()}

    def _save(self, number: int, found: Positions) -> None:
        """Save a part for a run of any number of processes: a file of gradients for each batch, then the scores.

        Those of the part before it are of no more use.
        """
        if cache_folder() is None:
            return
        for batch, place in enumerate(self.numbers):
            gradients = {f"gradient {name}": value for name, value in self.runs.gradients_by_name(batch).items()}
            late = {f"late {name}": value for (name, one), value in self.late.items() if one == batch}
            write_cached_tensors(f"{self._gradients(number)}/{place}.safetensors", _copies(gradients | late), own=True)
        barrier()
        scores = {f"score {axis} {name}": value for (name, axis), value in found.items()}
        write_cached_tensors(f"part-{self.cut}-{number}.safetensors", _copies(scores))
        if self.saved is not None:
            uncache(self._gradients(self.saved))
        self.saved = number

    def _resume(self) -> tuple[int, Positions]:
        """The number of parts left to run, and the scores of those that an interrupted run has finished."""
        found: Positions = {}
        for number in reversed(range(len(self.parts))):
            saved = cached_tensors(f"part-{self.cut}-{number}.safetensors")
            if saved is None:
                continue
            self.saved = number
            for key, value in saved.items():
                _, axis, name = key.split(" ", 2)
                found[name, int(axis)] = value
        if self.saved is None:
            return len(self.parts), found
        for batch, place in enumerate(self.numbers):
            name = f"{self._gradients(self.saved)}/{place}.safetensors"
            gradients = {}
            for key, value in require_cached_tensors(name, CalibrationError, own=True).items():
                kind, _, of = key.partition(" ")
                if kind == "late":
                    self.late[of, batch] = value
                else:
                    gradients[of] = value
            self.runs.take_gradients(batch, gradients)
        return self.saved, found

    @cached_property
    def cut(self) -> str:
        """Fingerprint of parts and batches, which another number of processes may cut in another way."""
        found = repr((self.sizes, [list(map(str, part.nodes)) for part in self.parts]))
        return hashlib.sha256(found.encode()).hexdigest()[:8]

    def _gradients(self, number: int) -> str:
        """The cached folder of the gradients that parts before a part need: a file a batch, by its number."""
        return f"gradients-{self.cut}-{number}"

    def _loss(self, batch: int, output: Any) -> torch.Tensor:
        """The losses of the samples of a batch, summed."""
        samples, number, name = self.batches[batch], self.numbers[batch], TaylorImportancePass.name
        # split, whose gradient is one concatenation, where that of a slice is as large as the whole
        outputs = [output] if len(samples) == 1 else output_tensors(output)[0].split(1)
        pairs = zip(outputs, samples, strict=True)
        return torch.stack([finite_loss(self.graph_module, one, sample, number, name) for one, sample in pairs]).sum()


def finite_loss(graph_module: fx.GraphModule, output: Any, sample: Sample, number: int, name: str) -> torch.Tensor:
    """The loss of a sample, as :func:`sample_loss`; CalibrationError if it is not finite."""
    loss = sample_loss(graph_module, output, sample, number, name)
    if not bool(loss.isfinite()):
        trained = ((key, t) for key, t in weights(graph_module) if isinstance(t, nn.Parameter) and not t.is_meta)
        bad = next((key for key, tensor in trained if not bool(tensor.isfinite().all())), "")
        what = f"the loss is {loss.item()}{f': {bad} has values that are not finite' if bad else ''}"
        remedy = "Repair the weights, or look for samples that the model cannot process"
        raise CalibrationError(what, where="calibration", remedy=remedy)
    return loss


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in memory of their own: gradients of two values may be one tensor."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


@dataclass(frozen=True, eq=False)
class FisherImportancePass(ForwardImportancePass):
    """Scores units by removing them one after the other, first those that cost least together with all removed before.

    A gate of 1 multiplies each unit at its consumers. Let ``g_s (units,)`` be the gradient of the loss of sample ``s``
    by the gates: the sum over a unit's slice of weight times gradient, but without the gradient of any weight. To
    second order, removing the set ``S`` increases the loss by::

        1/2 1' F_SS 1,   F = mean over samples of g_s g_s'

    ``F`` has the rank of the number of samples, and is never formed: with the sums ``r_s`` of ``g_s`` over removed
    units, the next unit ``u`` costs::

        1/2 mean over s of g_su ** 2 + (1 - shrinkage) * max(mean over s of r_s g_su, 0)

    So units that do the same cost more together. That units compensate for each other counts for nothing: among many
    units there are always some whose gradients on a few samples happen to cancel, important ones too. All units of a
    kind are in one order; the score of a unit is its cost at its turn, or the largest cost before it.

    Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656), section 4: the
    Fisher matrix of masks, there diagonal and then in blocks, one for each layer.
    """

    name: ClassVar[str] = "fisher"
    preconditions = (require_weights, require_gradients)

    shrinkage: float = argument(
        0.5,
        "How much interactions are shrunk from their estimate, in [0, 1]; at 1 only the diagonal counts.",
        least=0,
        most=1,
    )
    steps: int = argument(256, "Steps for each kind; the same number of units is removed in each.", least=1)

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        return PassCost(runs=3.0 * taken, batch=min(self.batch, taken), backward=True, outputs=3)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        groups = tuple(group.tied() for group in groups)
        ends = np.cumsum([0, *(prod(group.shape) for group in groups)]).tolist()
        spans = {group.name: slice(*pair) for group, pair in zip(groups, pairwise(ends), strict=True)}
        rows, costs = self._gradients(graph_module, groups, spans), np.zeros(ends[-1])
        units: dict[str, Array] = {}
        for kind in dict.fromkeys(group.kind for group in groups):
            alike = [group for group in groups if group.kind == kind]
            columns = np.r_[tuple(spans[group.name] for group in alike)]
            costs[columns] = greedy_costs(rows[:, torch.from_numpy(columns)], self.shrinkage, self.steps)
            units.update({group.name: costs[spans[group.name]].reshape(group.shape) for group in alike})
        return Scores(units)

    def _gradients(
        self, graph_module: fx.GraphModule, groups: tuple[Group, ...], spans: Mapping[str, slice]
    ) -> torch.Tensor:
        """The gradient of each sample's loss by the gates: ``(samples, units)``."""
        axes = facts_of(graph_module)[Dependencies].axes
        places = [
            (spans[group.name], one, units_at(group, one, axes))
            for group, consumers in self.consumers(graph_module, groups)
            for one in consumers
        ]
        count = sum(prod(group.shape) for group in groups)
        gates = torch.ones(count, device=device_of(graph_module), requires_grad=True)
        samples = self.calibration(graph_module)
        rows = gates.detach().new_zeros(max(1, len(samples)), len(gates))
        mine = deal(range(len(samples)))
        for number in tracked(mine, self.name, len(mine)):
            by_consumer: dict[Consumer, torch.Tensor] = {}
            for span, consumer, units in places:
                gate = spread_gates(gates[span], units)
                by_consumer[consumer] = by_consumer[consumer] * gate if consumer in by_consumer else gate
            inputs = batched([samples[number]], graph_module)
            with clear_sample_errors(inputs):
                output = GatedRun(graph_module, by_consumer).run(*inputs.values())
            loss = finite_loss(graph_module, output, samples[number], number, self.name)
            rows[number] = torch.autograd.grad(loss, gates)[0]
        all_reduce([rows])  # of each row, all but one are zeros
        return rows


def greedy_costs(rows: torch.Tensor, shrinkage: float, steps: int) -> Array:
    """Costs ``(units,)``, increasing in the order of removal, from gradients by gates ``rows (samples, units)``."""
    samples, count = rows.shape
    alone = rows.double().square().sum(0).div_(2 * samples).cpu().numpy()
    removed = rows.new_zeros(samples)

    def take(left: Index, each: int) -> tuple[Index, Array]:
        together = ((removed @ rows) * ((1 - shrinkage) / samples)).clamp_min(0).double().cpu().numpy()[left]
        found = alone[left] + together
        picked = np.argpartition(found, each)[:each] if each < len(left) else np.arange(len(left))
        picked = picked[np.argsort(found[picked], kind="stable")]
        removed.add_(rows[:, torch.from_numpy(left[picked]).to(rows.device)].sum(1))
        return left[picked], found[picked]

    return costs_in_turn(count, steps, take, 1e-9 * float(alone.mean()) if count else 0.0)
