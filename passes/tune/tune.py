"""Tuning: parameters trained end to end on the slim model against the teacher, and folded into the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx, nn

from fxprune.axes import factors
from fxprune.data.calibration import IGNORED
from fxprune.errors import ArgumentError, CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, Source, add_note, facts_of
from fxprune.graph.tensors import device_of, get_tensor, map_tensors, require_weights, weights
from fxprune.masking.compare import TOLERANCE, Verified
from fxprune.masking.masked_run import UntouchedRun, at_least_float32
from fxprune.masking.objective import gives_classes
from fxprune.masking.parts import Part, output_numel, parts_to_run_again
from fxprune.masking.teacher import TeacherBatch, deal_in_step, divergence, rejection, run_logits, teacher_batches
from fxprune.offload.atomic import atomic_path
from fxprune.offload.files import is_offloading, write_values
from fxprune.offload.prefetch import autocast, free_bytes, gathers_weights, use_bf16
from fxprune.offload.ranks import (
    all_reduce,
    batch_for_all,
    broadcast,
    broadcast_object,
    check_same,
    gathered,
    is_first,
)
from fxprune.pipeline.arguments import Memory, Precision, argument, as_seed, path_or_empty, refuse
from fxprune.pipeline.contract import Pass, PassCost, PassResult, tracked
from fxprune.removal.removal import Removal, Removed
from fxprune.rules.products import LoneProduct, lone_products
from fxprune.rules.registry import written_sources

from .teacher import HELDOUT, Teacher

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

    rate: ClassVar[float] = 0.005
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


class TrainingRun(UntouchedRun):
    """An interpreter for runs whose gradients are due: on a CPU attention is in float32.

    Its gradient takes twice as long there in bfloat16.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        attention = target is torch.ops.aten.scaled_dot_product_attention.default and args[0].device.type == "cpu"
        if not (attention and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().call_function(target, args, kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = map_tensors((args, kwargs), at_least_float32)
            return super().call_function(target, *wide).to(args[0].dtype)


class VectorsRun(TrainingRun):
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

    rate: ClassVar[float] = 0.008
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


class WeightsRun(TrainingRun):
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


@dataclass(frozen=True, eq=False)
class Progress:
    """The state of a tuning between steps.

    Args:
        step: steps done.
        misses: measurements in a row without improvement.
        first: held-out divergence at the start, in nats per position.
        best: the lowest so far.
        kept: the trained tensors it was measured with; none if nothing was better than the start.
    """

    step: int
    misses: int
    first: float
    best: float
    kept: tuple[torch.Tensor, ...]

    def of_first(self, numbers: Sequence[torch.Tensor]) -> Progress:
        """The progress of the first process, in each of them: others may have rounded, resumed or stopped otherwise.

        Args:
            numbers: tensors of the shapes of those that are trained.
        """
        step, misses, first, best, count = broadcast_object(
            (self.step, self.misses, self.first, self.best, len(self.kept))
        )
        kept = tuple(tensor.detach().clone() for tensor in (self.kept or numbers)[:count])
        broadcast(kept)
        return Progress(step, misses, first, best, kept)

    @staticmethod
    def file(folder: str) -> Path:
        """The file in ``folder``: all processes read it, and the first one writes it."""
        return Path(folder) / "tuning.safetensors"

    def save(self, folder: str, mark: str, adam: torch.optim.Adam) -> None:
        """Save all that is needed to resume, in the first process; ``mark`` is the fingerprint of the run."""
        if not is_first():
            return
        held = {f"kept.{i}": tensor for i, tensor in enumerate(self.kept)}
        for i, numbers in enumerate(_trained(adam)):
            held[f"numbers.{i}"] = numbers.detach()
            held.update({f"{name}.{i}": torch.as_tensor(value) for name, value in adam.state[numbers].items()})
        state = {"step": self.step, "misses": self.misses, "first": self.first, "best": self.best}
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}
        with atomic_path(self.file(folder), parents=True) as new:
            save_file(tensors, new, metadata={"mark": mark, "progress": json.dumps(state)})

    @classmethod
    def load(cls, folder: str, mark: str, adam: torch.optim.Adam) -> Progress | None:
        """Load a run and restore ``adam`` and its tensors; None if the folder holds no run with this fingerprint."""
        path = cls.file(folder)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("mark") != mark:
                    return None
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # half a file, or another one: start again
            return None
        kept = []
        states: dict[int, dict[str, torch.Tensor]] = {}
        for i, numbers in enumerate(_trained(adam)):
            with torch.no_grad():
                numbers.copy_(held.pop(f"numbers.{i}"))
            if f"kept.{i}" in held:  # none if nothing was better yet
                kept.append(held.pop(f"kept.{i}").to(numbers.device))
        for key, value in held.items():
            name, _, i = key.rpartition(".")
            states.setdefault(int(i), {})[name] = value
        adam.load_state_dict({"state": states, "param_groups": adam.state_dict()["param_groups"]})
        return cls(**json.loads(metadata["progress"]), kept=tuple(kept))


def _trained(adam: torch.optim.Adam) -> list[torch.Tensor]:
    return [numbers for group in adam.param_groups for numbers in group["params"]]


class Training:
    """The run of one tuning of a slim graph.

    Processes share the samples of each step and of each measurement. Gradients are summed, so that all hold the same
    numbers, and stop at the same step.

    ``truth`` is the weight of the text's own tokens: 0 if the model does not predict next tokens.
    """

    def __init__(self, settings: TunePass, graph_module: fx.GraphModule, trained: Trained, teacher: Teacher) -> None:
        self.settings, self.graph_module, self.trained, self.teacher = settings, graph_module, trained, teacher
        self.device = device_of(graph_module)
        size = batch_for_all(settings.batch, len(teacher.heldout))
        heldout = list(teacher_batches(teacher.heldout, graph_module, size))
        self.heldout, self.measured = deal_in_step(heldout), sum(batch.positions for batch in heldout)
        self.batches = list(teacher_batches(teacher.train, graph_module, settings.batch, in_shards=True))
        self.parts = self._parts()
        self.numbers = [numbers.requires_grad_() for numbers in trained.initial(graph_module)]
        highest = settings.rate or trained.rate
        self.rates = [highest * rate for rate in trained.rates(graph_module)]
        groups = [{"params": [n], "lr": rate} for n, rate in zip(self.numbers, self.rates, strict=True)]
        self.adam = torch.optim.Adam(groups, fused=self.device.type in ("cpu", "cuda"))
        tries = bool(settings.truth) and broadcast_object(self._predicts_next(self.batches[0]))
        self.truth = settings.truth if tries else 0.0
        self._error = {"divergence": divergence, "acceptance": rejection}[settings.objective]
        self.steps = max(1, round(settings.epochs * len(self.batches)))
        self.bf16 = use_bf16(
            settings.precision,
            graph_module,
            lambda: self._error(self._logits(self.batches[0]), self.batches[0]),
            settings.name,
        )

    def run(self) -> Progress:
        first = self._measure()
        if not math.isfinite(first):
            remedy = "Check the weights and the samples"
            raise CalibrationError("an output of the slim model is not finite", where="tuning", remedy=remedy)
        resumed = Progress.load(self.settings.folder, self._mark, self.adam) if self.settings.folder else None
        check_same(lambda: {"the progress saved": resumed and resumed.step}, where=self.settings.folder or "tuning")
        progress = resumed or Progress(0, 0, first, first, ())
        if progress.misses >= self.settings.patience:  # an earlier run with this folder ended so
            return progress
        every = max(1, self.steps // self.settings.measurements)
        generator = torch.Generator().manual_seed(self.settings.seed)
        epochs = range(math.ceil(self.steps / len(self.batches)))
        order = [i for _ in epochs for i in torch.randperm(len(self.batches), generator=generator).tolist()]
        steps = range(progress.step, self.steps)
        for step in tracked(steps, "tuning", len(steps)):
            self._step(self.batches[order[step]], step)
            if (step + 1) % every and step + 1 < self.steps:
                continue
            error = self._measure()
            better = error < progress.best
            progress = Progress(
                step=step + 1,
                misses=0 if better else progress.misses + 1,
                first=progress.first,
                best=error if better else progress.best,
                kept=tuple(numbers.detach().clone() for numbers in self.numbers) if better else progress.kept,
            )
            if self.settings.folder:
                progress.save(self.settings.folder, self._mark, self.adam)
            if progress.misses >= self.settings.patience:
                break
        return progress

    def _parts(self) -> Sequence[Part]:
        """The parts that a backward run computes again; none if all activations of a step fit."""
        graph_module, memory = self.graph_module, self.settings.memory
        if memory == "auto":
            nodes = graph_module.graph.nodes
            traced = max((output_numel(node) for node in nodes if node.op == "placeholder"), default=1)
            taken = (value for value in self.batches[0].inputs.values() if isinstance(value, torch.Tensor))
            more = max((value.numel() for value in taken), default=1) / max(1, traced)
            wanted = 4.0 * more * sum(output_numel(node) for node in nodes if node.op == "call_function")
            # a run that keeps all activations keeps the weights that processes have read together
            fits = 2 * wanted <= free_bytes(self.device) and not gathers_weights()
            memory = broadcast_object("fast" if fits else "low")
        if memory == "fast" or written_sources(graph_module.graph):
            return ()
        return parts_to_run_again(graph_module)

    @cached_property
    def _mark(self) -> str:
        """Fingerprint of the run: its arguments, all that it trains on, and the weights it starts from."""
        parts = [tensor for _, tensor in weights(self.graph_module)]
        for one in (*self.teacher.train, *self.teacher.heldout):
            taken = (value for value in one.sample.inputs.values() if isinstance(value, torch.Tensor))
            parts += [*taken, one.sample.labels, one.classes, one.likelihoods]
        found = hashlib.sha256()
        for tensor in parts:
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return f"{self.settings} {self.trained.count} {found.hexdigest()}"

    def _step(self, batch: TeacherBatch, step: int) -> None:
        # the first steps of Adam are as long as any, and the least informed: the rate rises over a tenth of the steps,
        # then falls along a cosine
        factor = min(1.0, (step + 1) * 10 / self.steps) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with torch.enable_grad():
            with autocast(self.device, self.bf16):
                loss = self._loss(batch)  # in a frame of its own, so that the logits are freed before the backward run
            self.adam.zero_grad()
            if batch.share or gathers_weights():  # others wait for what this process reads of the weights
                loss.backward()
        for numbers in self.numbers:
            numbers.grad = torch.zeros_like(numbers) if numbers.grad is None or not batch.share else numbers.grad
        gradients = [numbers.grad for numbers in self.numbers if numbers.grad is not None]
        all_reduce(gradients)
        if bool(nn.utils.get_total_norm(gradients).isfinite()):
            self.adam.step()

    def _loss(self, batch: TeacherBatch) -> torch.Tensor:
        """Contribution of this process to the loss of a batch: the terms of its own samples."""
        truth = self.truth * batch.counted / batch.share if batch.share else 0.0
        return batch.share * self._error(self._logits(batch), batch, truth)

    def _measure(self) -> float:
        """The error on held-out samples, a mean over positions, in the precision of a step."""
        with torch.no_grad(), autocast(self.device, self.bf16):
            found = [
                (float(self._error(self._logits(batch), batch)) * batch.positions, counts)
                for batch, counts in self.heldout
            ]
        return sum(gathered([error for error, counts in found if counts])) / self.measured

    def _predicts_next(self, batch: TeacherBatch) -> bool:
        """Whether the model predicts next tokens: the label is an input, and no output depends on later inputs."""
        counted = batch.labels != IGNORED
        read = [
            name
            for name, value in batch.inputs.items()
            if isinstance(value, torch.Tensor)
            and value.shape == counted.shape
            and torch.equal(value[counted], batch.labels[counted].to(value.dtype))
        ]
        if not read:
            return False
        other = {name: batch.inputs[name].clone() for name in read}
        for value in other.values():
            value[:, -1] = torch.where(value[:, -1] == value[:, 0], value[:, -2], value[:, 0])
        with torch.no_grad():
            logits = self._logits(batch)
            changed = self._logits(dataclasses.replace(batch, inputs={**batch.inputs, **other}))
        if logits.shape[:2] != counted.shape:
            return False
        return bool((logits - changed)[:, :-1].abs().max() <= TOLERANCE * logits.abs().max())

    def _logits(self, batch: TeacherBatch) -> torch.Tensor:
        parts = self.parts if torch.is_grad_enabled() else ()
        return run_logits(self.trained.run(self.graph_module, self.numbers).in_step(), batch.inputs, parts)


_KEPT = 5.0
"""Tensors in float32 for each trained weight: its gradient, two moments, itself and the best so far."""


def _flag_or_auto(name: str, value: Any) -> bool | str:
    """A flag, or the word ``auto``."""
    if isinstance(value, bool):
        return value
    if value == "auto":
        return "auto"
    raise refuse(name, value, "True, False or 'auto'")


@dataclass(frozen=True, eq=False)
class TunePass(Pass):
    """Trains vectors, low-rank updates or weights of the slim model until its outputs match the dense ones.

    Unless ``weights`` are trained, all are frozen. The trained parameters are then a scale ``1 + 0.5 tanh(t)`` for each
    input and output of each product with a weight, and offsets of parameters of one axis, such as those of norms and
    biases, by Adam on the Kullback-Leibler divergence from the dense model. No gradient of a weight is needed, so
    memory is that of the activations of a batch. In the end all of it is folded into the weights: classes, names and
    sizes stay the same.

    With ``truth``, the next tokens of the text itself count beside the dense model's distribution: perplexity on plain
    text falls further, by what the slim model learns of such text and no longer has from the dense one.

    Now and then the error is measured on held-out samples. The best parameters there are folded in, so that the
    model is never worse on them than it was; after ``patience`` measurements without improvement, it stops.

    The verification of the removal stays valid: it was that removing equals masking, and the sizes are the same.
    """

    name: ClassVar[str] = "tune"
    stage: ClassVar[str] = "tune"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Teacher, Removed, Runnable, Shaped)
    preconditions = (require_weights,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Teacher,)
    keeps: ClassVar[tuple[type[Fact], ...]] = (Verified,)

    epochs: float = argument(2.0, "Epochs over the samples.", above=0)
    rate: float | None = argument(
        None,
        """Highest learning rate of Adam: it rises over the first tenth of the steps and falls to 0 along a cosine. None
        for 0.008 for weights, and 0.005 for vectors.""",
        above=0,
    )
    batch: int = argument(4, "Samples in a step.", least=1)
    everywhere: bool = argument(
        True,
        """Scale the inputs and outputs of all products; False for those that lost inputs alone, which learns less, and
        does best at four times the rate.""",
    )
    rank: int = argument(
        0,
        """Rank of a low-rank update of the weight of each of these products, beside the scales, as in LoRA; 0 for none.
        It learns more from much text, and overfits to little text sooner.""",
        least=0,
    )
    weights: bool | Literal["auto"] = argument(
        False,
        """Train the weights of these products themselves, and the parameters of one axis, in place of scales. It learns
        the most, and takes five times the memory of these weights beside them: gradients, two moments, themselves and
        the best so far. ``auto`` for weights if that fits into half the free memory and they are not in files, else
        scales and low-rank updates. Each moves by a fraction of its root mean square, so that a rate means the same for
        models of all sizes.""",
        check=_flag_or_auto,
    )
    truth: float = argument(
        0.0,
        """Weight of the cross-entropy of the samples' own next tokens beside the divergence; ignored for a model that
        does not predict next tokens, which is tried on a batch: its output must not depend on later tokens.""",
        least=0,
    )
    objective: Literal["divergence", "acceptance"] = argument(
        "divergence",
        """Aim of training and of early stopping: ``divergence``, predictions like the dense model's; ``acceptance``, a
        draft of which speculative decoding accepts as many tokens as can be.""",
    )
    precision: Precision = argument(
        "auto",
        """Precision of the products in a step and a measurement: ``bf16``, ``float32``, or ``auto``, which is ``bf16``
        if the device supports it natively and no op of the graph refuses it. What is trained stays in float32.""",
    )
    memory: Memory = argument(
        "auto",
        """Memory for the activations of a step: ``fast`` keeps all for the backward run; ``low`` those between parts of
        the model, and runs each part again, which takes a third more time; ``auto`` is ``fast`` if all fit into half
        the free memory, else ``low``.""",
    )
    measurements: int = argument(8, "How often the divergence is measured on held-out samples.", least=1)
    patience: int = argument(3, "Measurements without improvement before it stops.", least=1)
    folder: str = argument(
        "",
        "Where progress is saved; a run with the same arguments resumes from it. Empty for nowhere.",
        check=path_or_empty,
    )
    seed: int = argument(0, "Random seed of the order of the samples.", check=as_seed)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is True and self.rank:
            raise ArgumentError(
                "weights that are trained themselves take no low-rank update",
                where="rank",
                remedy="Leave out $rank or $weights",
                argument="rank",
                value=self.rank,
            )

    def cost(self, samples: int) -> PassCost:
        """Three runs of each recorded sample an epoch; trained weights with gradients, moments and the best so far."""
        runs = (4.0 if self.memory == "low" else 3.0) * self.epochs * samples + HELDOUT * (self.measurements + 1)
        kept = _KEPT if self.weights is True else 0.0
        return PassCost(runs=runs, batch=min(self.batch, samples), backward=True, outputs=3, weights=kept)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        teacher, removal = facts[Teacher], facts[Removed].removal
        own = TrainedWeights.of(graph_module, removal, self.everywhere)
        trained: Trained = own
        if not broadcast_object(self._trains_weights(own, device_of(graph_module))):
            trained = TrainedVectors.of(graph_module, removal, self.everywhere, self.rank)
        training = Training(self, graph_module, trained, teacher)
        progress = training.run().of_first(training.numbers)
        better = progress.best < progress.first
        if better:
            with torch.no_grad():
                for name, value in trained.folded(progress.kept, graph_module):
                    write_values(graph_module, name, value)
        unit = "nats per token" if gives_classes(graph_module) else "of the square of its outputs"
        measure, first, best = "divergence from the dense model", f"{progress.first:.3f}", f"{progress.best:.3f} {unit}"
        if self.objective == "acceptance":
            measure, first, best = "tokens accepted as a draft", f"{1 - progress.first:.1%}", f"{1 - progress.best:.1%}"
        change = f"{measure} from {first} to {best} on {teacher.heldout_from}"
        outcome = change if better else "training did not help, and nothing was changed"
        if training.truth < self.truth:
            add_note(graph_module, "the text itself was not counted in tuning: the model does not predict next tokens")
        what = "weights" if isinstance(trained, TrainedWeights) else "numbers"
        add_note(graph_module, f"tuned: {trained.count:,} {what}, {len(teacher.train)} samples; {outcome}")
        return PassResult(graph_module, better)

    def _trains_weights(self, trained: TrainedWeights, device: torch.device) -> bool:
        if self.weights != "auto":
            return bool(self.weights)
        return not is_offloading() and 2 * _KEPT * 4 * trained.count <= free_bytes(device)
