"""Tuning: parameters trained end to end on the slim model against the teacher, and folded into the weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx, nn

from fxprune.data.calibration import IGNORED, has_stalled
from fxprune.errors import ArgumentError, CalibrationError, FxpruneError
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, Source, add_note, facts_of
from fxprune.graph.tensors import device_of, require_weights, weights
from fxprune.masking.masked_run import PreciseRun
from fxprune.masking.objective import gives_classes, reads_no_later_tokens
from fxprune.masking.parts import Part, output_numel, parts_to_run_again
from fxprune.masking.teacher import (
    TeacherBatch,
    TeacherBatches,
    batch_size,
    deal_in_step,
    divergence,
    mean_error,
    rejection,
    run_logits,
)
from fxprune.offload.atomic import atomic_path, wrap_disk_errors
from fxprune.offload.files import cache_folder, free_disk, is_offloading, write_values
from fxprune.offload.prefetch import autocast, free_bytes, gathers_weights, use_bf16
from fxprune.offload.ranks import (
    all_reduce,
    broadcast,
    broadcast_object,
    check_same,
    run_on_first,
    world_size,
)
from fxprune.pipeline.arguments import Memory, Precision, argument, as_seed, path_or_empty, refuse
from fxprune.pipeline.contract import Pass, PassCost, PassResult, tracked
from fxprune.removal.removal import Removed
from fxprune.rules.registry import written_sources

from .teacher import HELDOUT, Teacher
from .trained import StoredWeights, Trained, TrainedVectors, TrainedWeights

_FILE = "tuning.safetensors"
"""In the folder of a run: all processes read it, and the first one writes it."""


@dataclass(frozen=True, eq=False)
class Progress:
    """The state of a tuning between steps.

    Args:
        step: steps done.
        errors: held-out divergence at the start and in each measurement, in nats per position.
        kept: the trained tensors with the lowest; none if nothing was better than the start.
    """

    step: int
    errors: tuple[float, ...]
    kept: tuple[torch.Tensor, ...]

    def of_first(self, numbers: Sequence[torch.Tensor]) -> Progress:
        """The progress of the first process, in each of them: others may have rounded, resumed or stopped otherwise.

        ``numbers`` are tensors of the shapes of those that are trained.
        """
        step, errors, count = broadcast_object((self.step, self.errors, len(self.kept)))
        kept = tuple(tensor.detach().clone() for tensor in (self.kept or numbers)[:count])
        broadcast(kept)
        return Progress(step, errors, kept)

    def save(self, folder: str, mark: str, adam: torch.optim.Adam) -> None:
        """Save all that is needed to resume, in the first process; ``mark`` is the fingerprint of the run.

        What is trained in files is saved before, by :meth:`StoredWeights.save`.

        Raises:
            FxpruneError: it could not be written; raised in all processes.
        """
        with wrap_disk_errors(folder, FxpruneError):
            run_on_first(partial(self._write, folder, mark, adam), FxpruneError)

    def _write(self, folder: str, mark: str, adam: torch.optim.Adam) -> None:
        held = {f"kept.{i}": tensor for i, tensor in enumerate(self.kept)}
        for i, group in enumerate(adam.param_groups):
            (numbers,) = group["params"]
            held[f"numbers.{i}"] = numbers.detach()
            held.update({f"{name}.{i}": torch.as_tensor(value) for name, value in adam.state[numbers].items()})
        state = {"step": self.step, "errors": self.errors}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        with atomic_path(Path(folder) / _FILE, parents=True) as new:
            save_file(tensors, new, metadata={"mark": mark, "progress": json.dumps(state)})

    @classmethod
    def load(cls, folder: str, mark: str, adam: torch.optim.Adam) -> Progress | None:
        """Load a run and restore ``adam`` and its tensors; None if the folder holds no run with this fingerprint."""
        path = Path(folder) / _FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = json.loads(metadata.get("progress", "{}"))
                if metadata.get("mark") != mark or "errors" not in state:
                    return None
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # half a file, or another one: start again
            return None
        kept = []
        states: dict[int, dict[str, torch.Tensor]] = {}
        for i, group in enumerate(adam.param_groups):
            (numbers,) = group["params"]
            with torch.no_grad():
                numbers.copy_(held.pop(f"numbers.{i}"))
            if f"kept.{i}" in held:  # none if nothing was better yet
                kept.append(held.pop(f"kept.{i}").to(numbers.device))
        for key, value in held.items():
            name, _, i = key.rpartition(".")
            states.setdefault(int(i), {})[name] = value
        adam.load_state_dict({"state": states, "param_groups": adam.state_dict()["param_groups"]})
        return cls(state["step"], tuple(state["errors"]), tuple(kept))


class Training:
    """The run of one tuning of a slim graph.

    Processes share the samples of each step and of each measurement. Gradients are summed, so that all hold the same
    numbers, and stop at the same step.

    ``truth`` is the weight of the text's own tokens: 0 if the model does not predict next tokens.
    """

    def __init__(self, settings: TunePass, graph_module: fx.GraphModule, trained: Trained, teacher: Teacher) -> None:
        self.settings, self.graph_module, self.trained, self.teacher = settings, graph_module, trained, teacher
        self.device = device_of(graph_module)
        size = batch_size(graph_module, [one.sample for one in teacher.heldout], settings.batch)
        heldout = TeacherBatches(teacher.heldout, graph_module, size)
        self.heldout, self.measured = deal_in_step(heldout), heldout.positions
        self.batches = TeacherBatches(teacher.train, graph_module, settings.batch, in_shards=True)
        self.stored: StoredWeights | None = getattr(trained, "stored", None)
        self.folder = settings.folder or str(cache_folder() or "")
        self.parts = self._parts()
        self.numbers = [numbers.requires_grad_() for numbers in trained.initial(graph_module)]
        highest = settings.rate or trained.rate
        rates = zip(self.numbers, trained.rates(graph_module), strict=True)
        groups = [{"params": [numbers], "lr": 0.0, "highest": highest * rate} for numbers, rate in rates]
        self.adam = torch.optim.Adam(groups, fused=self.device.type in ("cpu", "cuda"))
        tries = bool(settings.truth) and broadcast_object(self._predicts_next())
        self.truth = settings.truth if tries else 0.0
        self._error = {"divergence": divergence, "acceptance": rejection}[settings.objective]
        self.steps = max(1, round(settings.epochs * len(self.batches)))
        self._share = 1.0
        one = self.batches[0]
        self.bf16 = use_bf16(
            settings.precision, graph_module, lambda: self._error(self._logits(one), one), settings.name
        )

    def run(self) -> Progress:
        first = self._measure()
        if not math.isfinite(first):
            remedy = "Check the weights and the samples"
            raise CalibrationError("an output of the slim model is not finite", where="tuning", remedy=remedy)
        resumed = Progress.load(self.folder, self._mark, self.adam) if self.folder else None
        check_same(lambda: {"the progress saved": resumed and resumed.step}, where=self.folder or "tuning")
        if resumed and self.stored is not None:
            self.stored.load(resumed.step)
        progress = resumed or Progress(0, (first,), ())
        self._share = self._share_of_rate(progress.errors[0])
        if has_stalled(progress.errors, self.settings.patience):  # an earlier run ended so
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
            better = error < min(progress.errors)
            if better and self.stored is not None:
                self.stored.keep()
            progress = Progress(
                step=step + 1,
                errors=(*progress.errors, error if math.isfinite(error) else math.inf),
                kept=tuple(numbers.detach().clone() for numbers in self.numbers) if better else progress.kept,
            )
            if self.folder:
                self._save(progress)
            if has_stalled(progress.errors, self.settings.patience):
                break
        return progress

    def _share_of_rate(self, first: float) -> float:
        """The fraction of the highest rate at which weights are trained, by the divergence at the start."""
        by_nats = self.settings.objective == "divergence" and gives_classes(self.graph_module)
        return min(1.0, first) if by_nats and not self.settings.rate and self.trained.in_nats else 1.0

    def _save(self, progress: Progress) -> None:
        """Save the progress; of weights in files, if the disk has room for them."""
        if self.stored is not None and not self.stored.save(progress.step):
            return
        progress.save(self.folder, self._mark, self.adam)
        if self.stored is not None:
            self.stored.delete_previous(progress.step)

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
            fits = 2 * wanted <= free_bytes(self.device) and not gathers_weights() and self.stored is None
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
        shares = world_size() if self.stored is not None and gathers_weights() else 1
        return broadcast_object(f"{self.settings} {self.trained.count} {shares} {found.hexdigest()}")

    def _step(self, batch: TeacherBatch, step: int) -> None:
        # the first steps of Adam are as long as any, and the least informed: the rate rises over a tenth of the steps,
        # then falls along a cosine
        rising, falling = min(1.0, (step + 1) * 10 / self.steps), 0.5 * (1 + math.cos(math.pi * step / self.steps))
        factor = self._share * rising * falling
        for group in self.adam.param_groups:
            group["lr"] = group["highest"] * factor
        if self.stored is not None:
            self.stored.begin_step(factor, bool(batch.share))
        with torch.enable_grad():
            with autocast(self.device, self.bf16):
                loss = self._loss(batch)  # in a frame of its own, so that the logits are freed before the backward run
            self.adam.zero_grad()
            # others wait for what this process reads of the weights, and gives to the sums of gradients
            if batch.share or gathers_weights() or self.stored is not None:
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
        with autocast(self.device, self.bf16):
            return mean_error(self._error, self._logits, self.heldout, self.measured)

    def _predicts_next(self) -> bool:
        """Whether the model predicts next tokens: the label is an input, and no output depends on later inputs."""
        samples = self.teacher.train
        one = next((one for one in samples if bool((one.sample.labels != IGNORED).any())), samples[0])
        (batch,) = TeacherBatches([one], self.graph_module, 1)
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

        def logits(inputs: Mapping[str, Any]) -> torch.Tensor:
            return run_logits(PreciseRun(self.graph_module).in_step(), inputs)

        return reads_no_later_tokens(logits, batch.inputs, read)

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
    model is never worse on them than it was; after ``patience`` measurements without improvement it stops, unless the
    error is falling again.
    """

    name: ClassVar[str] = "tune"
    stage: ClassVar[str] = "tune"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Teacher, Removed, Runnable, Shaped)
    preconditions = (require_weights,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Teacher,)

    epochs: float = argument(2.0, "Epochs over the samples.", above=0)
    rate: float | None = argument(
        None,
        """Highest learning rate of Adam: it rises over the first tenth of the steps and falls to 0 along a cosine. None
        for 0.005 for vectors, and for weights for 0.008 for each nat of the divergence at the start, at most 0.008: the
        nearer the slim model is to the dense one, the less its weights have to move.""",
        above=0,
    )
    batch: int = argument(4, "Samples in a step.", least=1)
    everywhere: bool = argument(
        True,
        """Scale the inputs and outputs of all products; False for only those that lost inputs, which learns less, and
        does best at four times the rate.""",
    )
    rank: int = argument(
        0,
        """Rank of a low-rank update of the weight of each of these products, in addition to the scales, as in LoRA; 0
        for none. It learns more from much text, and overfits sooner to little text.""",
        least=0,
    )
    weights: bool | Literal["auto"] = argument(
        False,
        """Train the weights of these products themselves, and the parameters of one axis, in place of scales. This
        learns the most, and takes another five times the memory of these weights: gradients, two moments, the weights
        themselves and the best so far. For a model in files, all except the gradients are in files too, unless there is
        a ``folder``. ``auto``: weights if that fits into half the free memory, or for a model in files half the free
        disk, else scales and low-rank updates. Each weight moves by a fraction of its root mean square, so that a rate
        means the same for models of all sizes.""",
        check=_flag_or_auto,
    )
    truth: float = argument(
        0.0,
        """Weight of the cross-entropy of the samples' own next tokens, added to the divergence; ignored for a model
        that does not predict next tokens, as tested on a sample: its output must not depend on later tokens.""",
        least=0,
    )
    objective: Literal["divergence", "acceptance"] = argument(
        "divergence",
        """Objective of training and of early stopping: ``divergence``, predictions like the dense model's;
        ``acceptance``, a draft of which speculative decoding accepts as many tokens as possible.""",
    )
    precision: Precision = argument(
        "auto",
        """Precision of the products in a step and a measurement: ``bf16``, ``float32``, or ``auto``, which is ``bf16``
        if the device supports it natively and no op of the graph refuses it. What is trained stays in float32.""",
    )
    memory: Memory = argument(
        "auto",
        """Memory for the activations of a step: ``fast`` keeps all for the backward run; ``low`` keeps only those
        between parts of the model and recomputes each part, which takes a third more time; ``auto`` is ``fast`` if all
        fit into half the free memory, else ``low``.""",
    )
    measurements: int = argument(8, "How often the divergence is measured on held-out samples.", least=1)
    patience: int = argument(
        3, "Measurements without improvement before tuning stops, unless the error is falling again.", least=1
    )
    folder: str = argument(
        "",
        """Folder to save progress in, from which a run with the same arguments resumes; empty for none, or with
        ``offload`` for that of the unfinished run.""",
        check=path_or_empty,
    )
    seed: int = argument(0, "Random seed of the order of the samples.", check=as_seed)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is True and self.rank:
            what, remedy = "weights that are trained themselves take no low-rank update", "Leave out $rank or $weights"
            raise ArgumentError(what, where="rank", remedy=remedy, argument="rank", value=self.rank)

    def cost(self, samples: int) -> PassCost:
        """Three runs of each recorded sample an epoch; trained weights with gradients, moments and the best so far."""
        runs = (4.0 if self.memory == "low" else 3.0) * self.epochs * samples + HELDOUT * (self.measurements + 1)
        kept, batch = _KEPT if self.weights else 0.0, max(1, min(self.batch, samples))
        steps = self.epochs * samples / batch if self.weights and not self.folder else 0.0
        auto = self.weights == "auto"
        return PassCost(
            runs, batch, backward=True, outputs=3, weights=kept, if_free=auto, sweeps=runs / batch, updates=steps
        )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        teacher, removal = facts[Teacher], facts[Removed].removal
        own = TrainedWeights.of(graph_module, removal, self.everywhere)
        device = device_of(graph_module)
        in_files = is_offloading() and not self.folder and device.type in ("cpu", "meta")
        trains_weights = bool(self.weights)
        if self.weights == "auto":
            free = free_disk() if in_files else free_bytes(device)
            trains_weights = (in_files or not is_offloading()) and 2 * _KEPT * 4 * own.count <= free
        if not broadcast_object(trains_weights):
            trained: Trained = TrainedVectors.of(graph_module, removal, self.everywhere, self.rank)
        else:
            trained = own.in_files(graph_module, self.rate or own.rate) if in_files else own
        training = Training(self, graph_module, trained, teacher)
        progress = training.run().of_first(training.numbers)
        start, lowest = progress.errors[0], min(progress.errors)
        better = lowest < start
        if better:
            with torch.no_grad():
                for name, value in trained.folded(progress.kept, graph_module):
                    write_values(graph_module, name, value)
        unit = "nats per token" if gives_classes(graph_module) else "of the square of its outputs"
        measure, first, best = "divergence from the dense model", f"{start:.3f}", f"{lowest:.3f} {unit}"
        if self.objective == "acceptance":
            measure, first, best = "tokens accepted as a draft", f"{1 - start:.1%}", f"{1 - lowest:.1%}"
        change = f"{measure} from {first} to {best} on {teacher.heldout_from}"
        outcome = change if better else f"training did not help on {teacher.heldout_from}, and nothing was changed"
        if training.truth < self.truth:
            add_note(graph_module, "the text itself was not counted in tuning: the model does not predict next tokens")
        what = "weights" if isinstance(trained, TrainedWeights) else "numbers"
        add_note(graph_module, f"tuned: {trained.count:,} {what}, {len(teacher.train)} samples; {outcome}")
        return PassResult(graph_module, better)
