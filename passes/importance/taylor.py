"""Criteria from gradients: Taylor expansion of the loss, and the Fisher matrix of gates at units.

Source: Ma, Fang, Wang, "LLM-Pruner", NeurIPS 2023, section 3.2; equation numbers below are theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.axes import Index
from fxprune.data.calibration import Calibration, Sample, batched, clear_sample_errors, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, Groups, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import device_of, find_nonfinite, require_weights, weights
from fxprune.masking.masked_run import GatedRun, spread_gates
from fxprune.masking.objective import sample_loss
from fxprune.masking.parts import LOW_MEMORY, Hooks, Part, PartRuns
from fxprune.offload.files import cached, caching, is_caching, offloaded, uncache
from fxprune.offload.prefetch import current_prefetcher, to_device
from fxprune.offload.ranks import all_reduce, barrier, deal, shard, world_size
from fxprune.pipeline.arguments import Memory, Order, argument
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.removal import Array, Scores
from fxprune.rules.products import LoneProduct, lone_products
from fxprune.rules.registry import writes, written_sources
from fxprune.trace.fidelity import require_gradients

from .base import ImportancePass, Positions, axis_sums, memory_limit, parts_within
from .forward import ForwardImportancePass
from .reconstruction import costs_in_turn

Axes = Mapping[str, list[int]]
"""The axes of each parameter that scores are wanted for."""

_BLOCK = 2**20
"""Elements of a weight that are summed at a time if sums are not kept for all of them."""

_KEPT = {"vector": 0, "first": 1, "second": 0, "mix": 2}
"""Float32 tensors of the size of a weight that each order keeps while samples arrive."""


@dataclass(frozen=True, eq=False)
class RecordedProduct:
    """Inputs of a product with a weight, and gradients of its outputs, by number of the sample.

    The gradient of the weight is the product of the two. It is never formed as a whole: some rows of it are computed at
    a time, for one sample after the other. If the loss does not depend on the product, there are none.
    """

    product: LoneProduct
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def record(self, sample: int, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Record the inputs now, and the gradient of ``output`` when it arrives; return the tensor to continue with."""
        output = output if output.requires_grad else output.detach().requires_grad_()

        def receive(gradient: torch.Tensor) -> None:
            self.pairs[sample] = inputs.detach(), gradient

        output.register_hook(receive)
        return output

    def weight_gradients(self, rows: slice) -> Iterator[torch.Tensor]:
        """Yield some rows of the gradient of the weight in float32, for each sample that has one."""
        for pair in self.pairs.values():
            read, given = (value.reshape(-1, value.shape[-1]).float() for value in pair)
            first, second = (given, read) if self.product.axis == 1 else (read, given)
            yield first[:, rows].T @ second


def recordable_products(graph_module: fx.GraphModule) -> dict[str, LoneProduct]:
    """Products whose weights can do without gradients of their own, by name of the weight.

    There are none in a graph that writes to values: the input of a product may be overwritten later.
    """
    if any(writes(node) for node in graph_module.graph.nodes):
        return {}
    return {product.name: product for product in lone_products(graph_module)}


def count_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all samples: elements of the largest input of each."""
    sizes = ([v.numel() for v in sample.inputs.values() if isinstance(v, torch.Tensor)] for sample in samples)
    return sum(max(each, default=0) for each in sizes)


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
            parts = [axis_sums(value, axis) / self.samples for axis in self.axes[name]]
            self.kept[name] = parts if kept is None else [a + b for a, b in zip(kept, parts, strict=True)]
        elif kept is None:
            self.kept[name] = [gradient.clone(), *([gradient.square()] if self.order == "mix" else ())]
        else:
            kept[0].add_(gradient)
            for squares in kept[1:]:
                squares.addcmul_(gradient, gradient)  # without a temporary for the square

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
        return {(name, axis): axis_sums(saliency, axis) for axis in axes}

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
                joined = part if before is None else torch.cat((before, part)) if place[1] == 0 else before + part
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

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        sums = LOW_MEMORY if self.memory == "low" and _KEPT[self.order] else _KEPT[self.order]
        return PassCost(runs=3.0 * taken, batch=1, backward=True, outputs=3, weights=sums)

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        axes: dict[str, list[int]] = {}
        for name, axis in wanted:
            axes.setdefault(name, []).append(axis)
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        tokens, tensors, kept = count_tokens(samples), dict(weights(graph_module)), _KEPT[self.order]
        # bytes kept for each weight, itself included if it is prefetched
        costs = {name: 4.0 * (max(kept, 1) if self.memory == "low" else kept) * tensors[name].numel() for name in axes}
        recorded: dict[str, LoneProduct] = {}
        for name, product in recordable_products(graph_module).items() if kept else ():
            activations = 4.0 * tokens * sum(tensors[name].shape)
            if activations < costs.get(name, 0.0):
                recorded[name], costs[name] = product, activations
        if current_prefetcher() is not None:
            costs = {name: costs.get(name, 0.0) + tensor.nbytes for name, tensor in tensors.items()}
        parts = parts_within(self.memory, graph_module, costs, tokens)
        # of a weight that no loss reads, as of a layer behind the one that is used
        zeros = {(name, axis): torch.zeros(tensors[name].shape[axis]) for name, axis in wanted}
        return zeros | _GradientSweep(graph_module, samples, axes, self.order, parts, recorded).run()


class _GradientSweep:
    """Samples forward and back, part by part; each gradient is added to sums as it arrives, and freed.

    The graph runs on detached aliases of its parameters, so that the caller's ``.grad`` stays as it is; tied names
    share one alias, whose gradient is then that of all its uses. Weights and inputs that are written to are copied.
    The gradients of a weight that several parts read are summed for each sample before they count.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        samples: Sequence[Sample],
        axes: Axes,
        order: Order,
        parts: Sequence[Part],
        recorded: Mapping[str, LoneProduct],
    ) -> None:
        self.graph_module, self.total, self.order = graph_module, len(samples), order
        self.numbers = shard(range(len(samples)))
        """Of the samples of this process, among those of all."""
        self.samples = [samples[number] for number in self.numbers]
        self.saved: int | None = None
        """The last part that was saved."""
        self.parts, self.axes, self.home = parts, axes, device_of(graph_module)
        self.written = written_sources(graph_module.graph)
        tensors = dict(weights(graph_module))
        names = {id(tensors[name]): name for name in axes}
        self.wanted = {name: names[id(t)] for name, t in tensors.items() if id(t) in names}
        self.reads = [{self.wanted[name] for name in part.reads if name in self.wanted} for part in parts]
        self.recorded = {name: RecordedProduct(product) for name, product in recorded.items()}
        self.late: dict[tuple[str, int], torch.Tensor] = {}
        """By weight and sample: the gradient from later parts of a weight that an earlier part reads too."""
        inputs = [
            {
                name: value.to(self.home, copy=name in self.written) if isinstance(value, torch.Tensor) else value
                for name, value in sample.inputs.items()
            }
            for sample in self.samples
        ]
        self.runs = PartRuns(graph_module, parts, inputs, self.wanted)

    def run(self) -> Positions:
        left, found = self._resume()
        count = max(2 * left - 1, 0) * len(self.samples)
        for done in tracked(self._steps(left), "gradients", count):
            found.update(done)
        return found

    def _steps(self, left: int) -> Iterator[Positions]:
        """Run the first ``left`` parts; after each sample, yield the scores that are complete."""
        for part in self.parts[: max(left - 1, 0)]:
            for _ in self.runs.forward(part):
                yield {}
        for number, part in reversed(list(enumerate(self.parts[:left]))):
            if not self.runs.needs_gradients(part):
                yield from [{}] * len(self.samples)
                continue
            before = set[str]().union(*self.reads[:number])
            mine = {name: self.axes[name] for name in self.axes if name in self.reads[number] - before}
            records = [self.recorded[name] for name in mine if name in self.recorded]
            summed = {name: mine[name] for name in mine if name not in self.recorded}
            sums = _Sums(self.order, summed, self.total)
            watch = partial(self._hooks, records)
            for sample in self.runs.backward(part, partial(self._aliases, part, sums), self._loss, watch):
                if sample < len(self.samples) - 1:
                    yield {}
            found = self._scores(sums, records)
            self._save(number, found)
            yield found

    def _aliases(self, part: Part, sums: _Sums, sample: int) -> dict[str, torch.Tensor]:
        shared: dict[int, torch.Tensor] = {}
        for name in part.reads:
            tensor = self.runs.tensor(name)
            if id(tensor) not in shared:
                alias = tensor.detach().clone() if name in self.written else tensor.detach()
                if name in self.wanted and name not in self.recorded:
                    alias.requires_grad_().register_post_accumulate_grad_hook(
                        partial(self._receive, self.wanted[name], sums, sample)
                    )
                shared[id(tensor)] = alias
        return {name: shared[id(self.runs.tensor(name))] for name in part.reads}

    def _receive(self, name: str, sums: _Sums, sample: int, alias: torch.Tensor) -> None:
        """Add the gradient of a weight to the sums; keep it if an earlier part reads the weight too."""
        gradient, alias.grad = alias.grad, None
        assert gradient is not None
        late = self.late.pop((name, sample), None)
        whole = gradient.float() if late is None else gradient.float() + to_device(late, gradient.device)
        if name in sums.axes:
            sums.add(name, alias.detach().float(), whole)
        else:
            self.late[name, sample] = offloaded(to_device(whole, self.home))

    def _hooks(self, records: Sequence[RecordedProduct], sample: int) -> Hooks:

        def record(recorded: RecordedProduct, value: torch.Tensor) -> torch.Tensor:
            return recorded.record(sample, self.runs.value(recorded.product.source), value)

        return {recorded.product.node: partial(record, recorded) for recorded in records}

    def _scores(self, sums: _Sums, records: Sequence[RecordedProduct]) -> Positions:
        """The scores of weights that no earlier part reads."""
        for name, sample in [key for key in self.late if key[0] in sums.axes]:  # this part reads only its dtype
            weight = self.runs.tensor(name).detach().float()
            sums.add(name, weight, to_device(self.late.pop((name, sample)), weight.device))
        sums.all_reduce()
        found: Positions = {}
        for name in sums.axes:
            found |= sums.finish(name, self.runs.tensor(name))
        for recorded in records:
            name = recorded.product.name
            rows = _Sums(self.order, {name: self.axes[name]}, self.total)
            found |= rows.by_rows(name, self.runs.tensor(name), recorded.weight_gradients)
            recorded.pairs.clear()
        return {place: to_device(value, self.home) for place, value in found.items()}

    def _save(self, number: int, found: Positions) -> None:
        """Save a part for a run of any number of processes: a file of gradients for each sample, then the scores.

        Those of the part before it are of no more use.
        """
        if not is_caching():
            return
        for sample, place in enumerate(self.numbers):
            gradients = {f"gradient {name}": value for name, value in self.runs.gradients_by_name(sample).items()}
            late = {f"late {name}": value for (name, one), value in self.late.items() if one == sample}
            _cache_tensors(f"{self._gradients(number)}/{place}.safetensors", gradients | late, own=True)
        barrier()
        scores = {f"score {axis} {name}": value for (name, axis), value in found.items()}
        _cache_tensors(f"part-{self.cut}-{number}.safetensors", scores)
        if self.saved is not None:
            uncache(self._gradients(self.saved))
        self.saved = number

    def _resume(self) -> tuple[int, Positions]:
        """The number of parts left to run, and the scores of those that an interrupted run has finished."""
        found: Positions = {}
        for number in reversed(range(len(self.parts))):
            file = cached(f"part-{self.cut}-{number}.safetensors")
            if file is None:
                continue
            self.saved = number
            for key, value in load_file(file).items():
                _, axis, name = key.split(" ", 2)
                found[name, int(axis)] = value
        if self.saved is None:
            return len(self.parts), found
        for sample, place in enumerate(self.numbers):
            name = f"{self._gradients(self.saved)}/{place}.safetensors"
            file = cached(name, own=True)
            if file is None:
                what, remedy = f"{name} is missing", "Delete the folder of the unfinished run, and start again"
                raise CalibrationError(what, where="the run to resume", remedy=remedy)
            gradients = {}
            for key, value in load_file(file).items():
                kind, _, of = key.partition(" ")
                if kind == "late":
                    self.late[of, sample] = value
                else:
                    gradients[of] = value
            self.runs.take_gradients(sample, gradients)
        return self.saved, found

    @cached_property
    def cut(self) -> str:
        """Fingerprint of the parts: another number of processes may cut the graph into others."""
        nodes = repr([list(map(str, part.nodes)) for part in self.parts])
        return hashlib.sha256(nodes.encode()).hexdigest()[:8]

    def _gradients(self, number: int) -> str:
        """The cached folder of the gradients that parts before a part need: a file a sample, by its number."""
        return f"gradients-{self.cut}-{number}"

    def _loss(self, sample: int, output: Any) -> torch.Tensor:
        number, name = self.numbers[sample], TaylorImportancePass.name
        return finite_loss(self.graph_module, output, self.samples[sample], number, name)


def finite_loss(graph_module: fx.GraphModule, output: Any, sample: Sample, number: int, name: str) -> torch.Tensor:
    """The loss of a sample, as :func:`sample_loss`; CalibrationError if it is not finite."""
    loss = sample_loss(graph_module, output, sample, number, name)
    if not bool(loss.isfinite()):
        bad = find_nonfinite(graph_module)
        what = f"the loss is {loss.item()}{f': {bad} has values that are not finite' if bad else ''}"
        remedy = "Repair the weights, or look for samples that the model cannot process"
        raise CalibrationError(what, where="calibration", remedy=remedy)
    return loss


def _cache_tensors(name: str, tensors: Mapping[str, torch.Tensor], *, own: bool = False) -> None:
    with caching(name, own=own) as file:
        if file is not None:  # copies, since gradients of two values may be one tensor
            copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
            save_file(copies, file)


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
