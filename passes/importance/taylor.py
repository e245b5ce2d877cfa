"""Taylor expansion of the loss: what removing a structure would cost, from gradients on a few samples.

Source: Ma, Fang, Wang, "LLM-Pruner", NeurIPS 2023, section 3.2; equation numbers below are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.data.calibration import Calibration, Sample, next_token_loss, require_logits, spread
from fxprune.data.ranks import own
from fxprune.discovery.groups import Groups
from fxprune.errors import CalibrationError
from fxprune.graph.carrier import current_carrier, place_of, to_place
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.shelf import recalled, remembering, stored
from fxprune.graph.tensors import device_of, name_of_nonfinite, require_weights, weights
from fxprune.masking.cuts import Part
from fxprune.masking.in_parts import PartRuns, Watch
from fxprune.masking.masked_run import output_tensors
from fxprune.pipeline.arguments import one_of, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.pipeline.words import ORDERS
from fxprune.rules.aliasing import written_sources
from fxprune.rules.product import LoneProduct
from fxprune.trace.fidelity import require_gradients

from .activations import Recorded, recordable, tokens_of
from .base import ImportancePass
from .memory import amount, parts_within
from .sums import SUMS, Axes, ElementSums, Positions, Sums

__all__ = ["ORDERS", "TaylorImportancePass"]


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

    def _watch(self, records: Sequence[Recorded], sample: int) -> Watch:
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
