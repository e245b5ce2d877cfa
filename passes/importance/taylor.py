"""Taylor expansion of the loss, from per-sample gradients summed per slice.

Source: Ma, Fang, Wang, "LLM-Pruner", NeurIPS 2023, section 3.2; equation numbers below are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.data.calibration import Calibration, Sample, next_token_loss, require_logits, spread
from fxprune.discovery.groups import Groups
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import device_of, name_of_nonfinite, require_weights, weights
from fxprune.masking.masked_run import output_tensors
from fxprune.masking.parts import Hooks, Part, PartRuns
from fxprune.offload.files import recalled, remembering, stored
from fxprune.offload.prefetch import current_carrier, place_of, to_place
from fxprune.offload.ranks import add_up, own
from fxprune.pipeline.arguments import ORDERS, one_of, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.rules.aliasing import writes, written_sources
from fxprune.rules.products import LoneProduct, lone_products
from fxprune.trace.fidelity import require_gradients

from .base import ImportancePass, amount, axis_sums, parts_within

__all__ = [
    "ORDERS",
    "SUMS",
    "Axes",
    "ElementSums",
    "Positions",
    "Recorded",
    "Sums",
    "TaylorImportancePass",
    "recordable",
    "tokens_of",
]


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


Positions = dict[tuple[str, int], torch.Tensor]
"""By parameter and axis: a score for each position along it."""

_BLOCK = 2**20
"""Elements of a weight that are looked at together, where sums are not kept of all of them."""

Axes = Mapping[str, list[int]]
"""The axes of parameters that are wanted."""


@dataclass
class Sums:
    """What is kept of the gradients of some parameters during one sweep."""

    axes: Axes
    samples: int
    tensors: ClassVar[int] = 0
    slices: Positions = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take in the gradient of one sample."""
        raise NotImplementedError

    def add_up(self) -> None:
        """Make them the sums of all processes, where several share the samples."""
        add_up(self.slices[place] for place in sorted(self.slices))

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        """The slice scores; ``values`` are the weights."""
        raise NotImplementedError

    def _add_slices(self, name: str, value: torch.Tensor) -> None:
        for axis in self.axes[name]:
            part = axis_sums(value, axis) / self.samples
            self.slices[name, axis] = self.slices[name, axis] + part if (name, axis) in self.slices else part


class _VectorSums(Sums):
    """Signed slice sums of ``w * g``; the absolute value at the end."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, weight * gradient)

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return {key: value.abs() for key, value in self.slices.items()}


class _SecondSums(Sums):
    """Slice sums of ``w * g_s ** 2 * w``, never negative."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, (weight * gradient).square())

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return dict(self.slices)


@dataclass
class ElementSums(Sums):
    """Sums for each element, which become slice sums when all samples are in them."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.kept[name] = self.kept[name].add_(gradient) if name in self.kept else gradient.clone()

    def by_rows(
        self, name: str, weight: torch.Tensor, gradients: Callable[[slice], Iterable[torch.Tensor]]
    ) -> Positions:
        """The slice scores of one weight, some rows of it at a time: sums are there for these alone.

        Args:
            name: of the weight.
            weight: itself.
            gradients: given rows, these rows of the gradient of each sample.
        """
        found: Positions = {}
        step = max(1, _BLOCK // max(1, weight[:1].numel()))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            values = weight[rows].detach().float()
            self.start(name, values)
            for gradient in gradients(rows):
                self.add(name, values, gradient)
            self.add_up()
            saliency = self._saliency(name, values)
            for axis in self.axes[name]:
                part, before = axis_sums(saliency, axis), found.get((name, axis))
                joined = part if before is None else torch.cat((before, part)) if axis == 0 else before + part
                found[name, axis] = joined
        return found

    def start(self, name: str, weight: torch.Tensor) -> None:
        """Begin with sums of no sample, which are there then whether a gradient arrives or not."""
        self.kept[name] = torch.zeros_like(weight)

    def add_up(self) -> None:
        """Make them the sums of all processes, where several share the samples."""
        add_up(self.kept[name] for name in sorted(self.kept))

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        found: Positions = {}
        for name, axes in self.axes.items():
            saliency = self._saliency(name, values[name].detach().float())
            found.update({(name, axis): axis_sums(saliency, axis) for axis in axes})
        return found

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What each element of a weight, or of rows of it, counts; its sums are taken away."""
        raise NotImplementedError


class _FirstSums(ElementSums):
    """``g`` by element."""

    tensors: ClassVar[int] = 1

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight * self.kept.pop(name).div_(self.samples)).abs_()


@dataclass
class _MixSums(ElementSums):
    """``g`` and ``h`` by element."""

    tensors: ClassVar[int] = 2
    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, name: str, weight: torch.Tensor) -> None:
        super().start(name, weight)
        self.squares[name] = torch.zeros_like(weight)

    def add_up(self) -> None:
        super().add_up()
        add_up(self.squares[name] for name in sorted(self.squares))

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        super().add(name, weight, gradient)
        if name in self.squares:
            self.squares[name].addcmul_(gradient, gradient)  # no square in memory beside the sum
        else:
            self.squares[name] = gradient.square()

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        g, h = self.kept.pop(name).div_(self.samples), self.squares.pop(name).div_(self.samples)
        return (weight * (g - h.mul_(weight).mul_(0.5))).abs_()


SUMS: dict[str, type[Sums]] = {
    "vector": _VectorSums,
    "first": _FirstSums,
    "second": _SecondSums,
    "mix": _MixSums,
}
"""By order of the expansion."""


@dataclass(frozen=True, eq=False)
class TaylorImportancePass(ImportancePass):
    """Units are scored by how much the loss is expected to change when they go.

    With weight ``w``, its gradient ``g`` (mean over samples) and the diagonal of the Fisher matrix ``h`` (mean over
    samples of the squared per-sample gradient), a slice is worth, over its elements::

        vector    | sum w * g |                     equation 3, first term, for the slice as one vector
        first     sum | w * g |                     equation 4, for each element
        second    sum | w * h * w |
        mix       sum | w * g - 1/2 * w * h * w |   equation 5

    Gradients come one sample at a time and are turned into slice sums as they arrive. ``vector`` and ``second`` are
    linear in what arrives, so nothing is kept. ``first`` and ``mix`` take an absolute value per element and need
    sums of gradients. Where ``memory`` does not hold them all, the graph runs in parts, each for all samples, which
    takes one more forward run and gives the same scores. With few samples what a product read, and the gradients of
    what it gave, are less than those sums: then they are kept, and sums are made of some rows of a weight at a time.

    Args:
        order: one of :data:`ORDERS`.
        memory: for sums of gradients: ``fast`` takes what all of them need, ``low`` as little as it can, a tenth of the
            bytes of the weights or what those of the largest need at the most, ``auto`` the one that fits into half the
            memory that is free; or a fraction of the bytes of all weights. ``mix`` keeps two float32 numbers for each
            weight, ``first`` one.
        samples: calibration samples to take, evenly spread; None for all.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Calibration, Runnable)
    carries: ClassVar[bool] = True

    order: str = "mix"
    memory: float | str = "auto"
    samples: int | None = None
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done."""
        super().__post_init__()
        one_of("taylor order", self.order, ORDERS)
        object.__setattr__(self, "memory", amount(self.memory))
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples, real weights and the gradients of the module."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)
        require_gradients(graph_module, self.name)

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        """Slice scores of every wanted axis."""
        axes: dict[str, list[int]] = {}
        for name, axis in wanted:
            axes.setdefault(name, []).append(axis)
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        tokens = tokens_of(samples)
        costs, recorded = self._costs(graph_module, axes, tokens)
        parts = parts_within(self.memory, graph_module, costs, tokens)
        return _Sweep(graph_module, own(samples), len(samples), axes, self.order, parts, recorded).run(self.track)

    def _costs(
        self, graph_module: fx.GraphModule, axes: Axes, tokens: int
    ) -> tuple[dict[str, float], dict[str, LoneProduct]]:
        """The bytes kept of each weight, itself among them where it is carried, and the products that are recorded."""
        tensors = dict(weights(graph_module))
        kept = SUMS[self.order].tensors
        costs = {name: 4.0 * (max(kept, 1) if self.memory == "low" else kept) * tensors[name].numel() for name in axes}
        recorded: dict[str, LoneProduct] = {}
        for name, product in recordable(graph_module).items() if kept else ():
            activations = 4.0 * tokens * sum(tensors[name].shape)
            if activations < costs.get(name, 0.0):
                recorded[name], costs[name] = product, activations
        if current_carrier() is not None:
            costs = {name: costs.get(name, 0.0) + tensor.nbytes for name, tensor in tensors.items()}
        return costs, recorded


class _Sweep:
    """Samples forward and back, part by part; each gradient goes to sums as it arrives and is freed.

    The graph runs on detached aliases of its parameters, so that the caller's ``.grad`` stays as it is; tied names
    share one alias, whose gradient is then that of all its uses. Weights and inputs that are written to are copies.
    The gradient of a weight that several parts read is added up sample by sample before it counts.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        samples: Sequence[Sample],
        total: int,
        axes: Axes,
        order: str,
        parts: Sequence[Part],
        recorded: Mapping[str, LoneProduct],
    ) -> None:
        self.graph_module, self.samples, self.total, self.order = graph_module, samples, total, order
        self.parts, self.home = parts, device_of(graph_module)
        self.tensors = dict(weights(graph_module))
        self.written = written_sources(graph_module.graph)
        names = {id(self.tensors[name]): name for name in axes}
        self.wanted = {name: names[id(t)] for name, t in self.tensors.items() if id(t) in names}
        self.reads = [{self.wanted[name] for name in part.reads if name in self.wanted} for part in parts]
        self.axes = axes
        self.recorded = {name: Recorded(product) for name, product in recorded.items()}
        self.late: dict[tuple[str, int], torch.Tensor] = {}
        self.runs = PartRuns(graph_module, parts, [self._inputs(sample) for sample in samples], self.wanted)

    def run(self, track: Track) -> Positions:
        """The slice scores."""
        left, found = self._recalled()
        count = max(2 * left - 1, 0) * len(self.samples)
        for done in track(self._steps(left), "gradients", count):
            found.update(done)
        return found

    def _steps(self, left: int) -> Iterator[Positions]:
        """Do the first ``left`` parts; yield after each sample what is known by then."""
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
            sums = SUMS[self.order]({name: mine[name] for name in mine if name not in self.recorded}, self.total)
            watch = partial(self._watch, records)
            for sample in self.runs.backward(part, partial(self._aliases, part, sums), self._loss, watch):
                if sample < len(self.samples) - 1:
                    yield {}
            found = self._finished(sums) | self._by_rows(records)
            self._remember(number, found)
            yield found

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        """The inputs of a sample on the device of the weights; one that the graph writes to is a copy."""
        return {
            name: value.to(self.home, copy=name in self.written) if isinstance(value, torch.Tensor) else value
            for name, value in sample.inputs.items()
        }

    def _aliases(self, part: Part, sums: Sums, sample: int) -> dict[str, torch.Tensor]:
        """What a part reads in place of its weights."""
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

    def _receive(self, name: str, sums: Sums, sample: int, alias: torch.Tensor) -> None:
        """Take in the gradient of a weight; where parts before read it too, put it down until theirs is there."""
        gradient, alias.grad = alias.grad, None
        assert gradient is not None
        late = self.late.pop((name, sample), None)
        whole = gradient.float() if late is None else gradient.float() + to_place(late, gradient.device)
        if name in sums.axes:
            sums.add(name, alias.detach().float(), whole)
        else:
            self.late[name, sample] = stored(to_place(whole, self.home))

    def _watch(self, records: Sequence[Recorded], sample: int) -> Hooks:
        """What takes in what the products of recorded weights read and gave."""

        def take(record: Recorded, value: torch.Tensor) -> torch.Tensor:
            return record.take(sample, self.runs.value(record.product.source), value)

        return {record.product.node: partial(take, record) for record in records}

    def _by_rows(self, records: Sequence[Recorded]) -> Positions:
        """The scores of recorded weights."""
        found: Positions = {}
        for record in records:
            name = record.product.name
            sums = SUMS[self.order]({name: self.axes[name]}, self.total)
            assert isinstance(sums, ElementSums)
            found.update(sums.by_rows(name, self.runs.tensor(name), record.gradients))
            record.forget()
        return {place: to_place(value, self.home) for place, value in found.items()}

    def _finished(self, sums: Sums) -> Positions:
        """The scores of weights that no part before this one reads; one that it reads the dtype of alone has none."""
        for name, sample in [key for key in self.late if key[0] in sums.axes]:
            weight = self.runs.tensor(name).detach().float()
            sums.add(name, weight, to_place(self.late.pop((name, sample)), weight.device))
        sums.add_up()
        found = sums.finish({name: self.runs.tensor(name) for name in sums.axes})
        return {place: to_place(value, self.home) for place, value in found.items()}

    def _remember(self, number: int, found: Positions) -> None:
        """Put down for a run that goes on from here what is known when a part is done."""
        with remembering(f"part-{number}.safetensors") as file:
            if file is not None:
                scores = {f"score {axis} {name}": value for (name, axis), value in found.items()}
                late = {f"late {sample} {name}": value for (name, sample), value in self.late.items()}
                tensors = scores | late | self.runs.gradients_by_name()
                save_file(
                    {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, file
                )

    def _recalled(self) -> tuple[int, Positions]:
        """How many parts are left to do, and the scores of those that are done."""
        found: Positions = {}
        left = len(self.parts)
        for number in reversed(range(len(self.parts))):
            file = recalled(f"part-{number}.safetensors")
            if file is None:
                continue
            left, known = number, load_file(file)
            self.runs.take_gradients(known)
            self.late = {}
            for key, value in known.items():
                what, which, name = key.split(" ", 2)
                if what == "score":
                    found[name, int(which)] = value
                elif what == "late":
                    self.late[name, int(which)] = value
        return left, found

    def _loss(self, sample: int, output: Any) -> torch.Tensor:
        labels = self.samples[sample].labels.to(place_of(self.graph_module))
        loss = next_token_loss(require_logits(output_tensors(output), labels, TaylorImportancePass.name), labels)
        if not bool(loss.isfinite()):
            bad = name_of_nonfinite(self.graph_module)
            raise CalibrationError(
                f"the loss is {loss.item()}{f': {bad} has values that are not finite' if bad else ''}",
                where="calibration",
                remedy="Mend the weights, or look for samples that the model cannot take",
            )
        return loss
