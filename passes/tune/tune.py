"""Tuning: end-to-end training of the slim model against the teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx

from fxprune.data.calibration import IGNORED, next_token_loss
from fxprune.errors import ArgumentError, CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, add_note, facts_of
from fxprune.graph.tensors import device_of, require_weights, weights
from fxprune.masking.compare import TOLERANCE, Verified
from fxprune.offload.files import put_values
from fxprune.offload.prefetch import autocast, narrowed
from fxprune.offload.ranks import rank
from fxprune.pipeline.arguments import PRECISIONS, as_path, as_seed, flag, number, one_of, whole_number
from fxprune.pipeline.contract import Pass, PassResult, Track, check_track, no_progress
from fxprune.removal.removal import Removed

from .teacher import LessonBatch, Teacher, divergence, lesson_batches, logits_of
from .vectors import Vectors, Weights

__all__ = ["Learned", "Progress", "Training", "TunePass", "digest", "read_progress", "write_progress"]


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a tuning is.

    Args:
        step: steps done.
        misses: measurements in a row that did no better.
        first: held-out divergence at the start, in nats a position.
        best: the lowest so far.
        kept: the numbers it was measured with; none where nothing was better than the start.
    """

    step: int
    misses: int
    first: float
    best: float
    kept: tuple[torch.Tensor, ...]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return what tells these tensors, in this order, from others: by their types, shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_progress(folder: str, mark: str, progress: Progress, adam: torch.optim.Adam) -> None:
    """Write all that is needed to go on, in place of what was written before.

    Args:
        folder: where to; it is made.
        mark: what tells this run from others.
        progress: how far it is.
        adam: the optimiser of what is learned.
    """
    held = {f"kept.{i}": tensor for i, tensor in enumerate(progress.kept)}
    for i, numbers in enumerate(_learned(adam)):
        held[f"numbers.{i}"] = numbers.detach()
        held.update({f"{name}.{i}": torch.as_tensor(value) for name, value in adam.state[numbers].items()})
    said = {"step": progress.step, "misses": progress.misses, "first": progress.first, "best": progress.best}
    path = _file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}
    save_file(tensors, new, metadata={"mark": mark, "progress": json.dumps(said)})
    new.replace(path)


def read_progress(folder: str, mark: str, adam: torch.optim.Adam) -> Progress | None:
    """Take up the state of ``adam`` and what it learns again; None where the folder holds no run with this mark."""
    path = _file(folder)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("mark") != mark:
                return None
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # half a file, or another one: begin anew
        return None
    learned, kept = _learned(adam), []
    states: dict[int, dict[str, torch.Tensor]] = {}
    for i, numbers in enumerate(learned):
        with torch.no_grad():
            numbers.copy_(held.pop(f"numbers.{i}"))
        if f"kept.{i}" in held:  # none where nothing was better yet
            kept.append(held.pop(f"kept.{i}").to(numbers.device))
    for key, value in held.items():
        name, _, i = key.rpartition(".")
        states.setdefault(int(i), {})[name] = value
    adam.load_state_dict({"state": states, "param_groups": adam.state_dict()["param_groups"]})
    return Progress(**json.loads(said["progress"]), kept=tuple(kept))


def _file(folder: str) -> Path:
    """Several processes all do the same, each with a file of its own: none reads or renames half of another's."""
    return Path(folder) / (f"tuning.{rank()}.safetensors" if rank() else "tuning.safetensors")


def _learned(adam: torch.optim.Adam) -> list[torch.Tensor]:
    return [numbers for group in adam.param_groups for numbers in group["params"]]


_RISE = 10
"""The rate rises over one in so many steps."""

_FUSED = ("cpu", "cuda")
"""Devices whose Adam takes a step in one kernel."""


class Learned(Protocol):
    """What a tuning learns: numbers in some tensors, and what a graph does with them."""

    @property
    def count(self) -> int:
        """How many numbers there are."""

    def begin(self, graph_module: fx.GraphModule) -> list[torch.Tensor]:
        """Return the numbers that change nothing."""

    def rates(self, graph_module: fx.GraphModule) -> list[float]:
        """Return how fast each tensor of numbers moves, as a part of the rate."""

    def run(self, graph_module: fx.GraphModule, numbers: Sequence[torch.Tensor]) -> fx.Interpreter:
        """Return an interpreter that runs the graph with these numbers."""

    def folded(
        self, numbers: Sequence[torch.Tensor], graph_module: fx.GraphModule
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the new value of each tensor that the numbers change."""


class Training:
    """The run of one tuning.

    Args:
        settings: the pass.
        graph_module: the slim graph.
        learned: what is learned.
        teacher: what the dense model said.

    Attributes:
        truth: weight of the text's own tokens; 0 where the model says something else than next tokens.

    Raises:
        PassError: bfloat16 was asked for, and an op of the graph refuses it.
    """

    def __init__(self, settings: TunePass, graph_module: fx.GraphModule, learned: Learned, teacher: Teacher) -> None:
        self.settings, self.graph_module, self.learned, self.teacher = settings, graph_module, learned, teacher
        self.device = device_of(graph_module)
        self.heldout = list(lesson_batches(teacher.heldout, graph_module, settings.batch))
        self.batches = list(lesson_batches(teacher.lessons, graph_module, settings.batch))
        self.numbers = [numbers.requires_grad_() for numbers in learned.begin(graph_module)]
        self.rates = [settings.rate * rate for rate in learned.rates(graph_module)]
        groups = [{"params": [n], "lr": rate} for n, rate in zip(self.numbers, self.rates, strict=True)]
        self.adam = torch.optim.Adam(groups, fused=self.device.type in _FUSED)
        self.truth = settings.truth if settings.truth and self._says_next(self.batches[0]) else 0.0
        self.steps = max(1, round(settings.epochs * len(self.batches)))
        self.narrow = narrowed(
            settings.precision, graph_module, lambda: self._divergence(self.batches[0]), settings.name
        )

    def run(self) -> Progress:
        """Learn until the end, or until it does no better.

        Raises:
            CalibrationError: what the model says is not finite.
        """
        progress = self._begun()
        if progress.misses >= self.settings.patience:  # an earlier run with this folder ended so
            return progress
        every = max(1, self.steps // self.settings.measurements)
        order = list(self._order())
        steps = range(progress.step, self.steps)
        for step in self.settings.track(steps, "tuning", len(steps)):
            self._learn(self.batches[order[step]], step)
            if (step + 1) % every and step + 1 < self.steps:
                continue
            error = self._measure()
            better = error < progress.best
            progress = Progress(
                step=step + 1,
                misses=0 if better else progress.misses + 1,
                first=progress.first,
                best=error if better else progress.best,
                kept=self._now() if better else progress.kept,
            )
            if self.settings.folder:
                write_progress(self.settings.folder, self._mark, progress, self.adam)
            if progress.misses >= self.settings.patience:
                break
        return progress

    def _begun(self) -> Progress:
        first = self._measure()
        if not math.isfinite(first):
            raise CalibrationError(
                "what the slim model says is not finite", where="tuning", remedy="Check the weights and the samples"
            )
        found = read_progress(self.settings.folder, self._mark, self.adam) if self.settings.folder else None
        return found or Progress(0, 0, first, first, ())

    def _now(self) -> tuple[torch.Tensor, ...]:
        return tuple(numbers.detach().clone() for numbers in self.numbers)

    @cached_property
    def _mark(self) -> str:
        """What tells this run from others: its arguments, all that it learns from, and the weights it begins with."""
        parts = [tensor for _, tensor in weights(self.graph_module)]
        for lesson in (*self.teacher.lessons, *self.teacher.heldout):
            taken = (value for value in lesson.sample.inputs.values() if isinstance(value, torch.Tensor))
            parts += [*taken, lesson.sample.labels, lesson.classes, lesson.likelihoods]
        return f"{self.settings} {self.learned.count} {digest(parts)}"

    def _order(self) -> Iterator[int]:
        """The batches, shuffled anew each time all have had their turn."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(math.ceil(self.steps / len(self.batches))):
            yield from torch.randperm(len(self.batches), generator=generator).tolist()

    def _learn(self, batch: LessonBatch, step: int) -> None:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * _share(step, self.steps)
        with torch.enable_grad():
            with autocast(self.device, self.narrow):
                loss = self._loss(batch)
            self.adam.zero_grad()
            loss.backward()
        gradients = [numbers.grad for numbers in self.numbers if numbers.grad is not None]
        if gradients and all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.adam.step()

    def _measure(self) -> float:
        """The divergence on held-out samples, in nats a position, in the precision of a step."""
        with torch.no_grad(), autocast(self.device, self.narrow):
            found = [float(self._divergence(b)) * b.classes.shape[:2].numel() for b in self.heldout]
        return sum(found) / sum(b.classes.shape[:2].numel() for b in self.heldout)

    def _loss(self, batch: LessonBatch) -> torch.Tensor:
        """What a step makes smaller."""
        logits = self._logits(batch)
        loss = divergence(logits, batch)
        if not self.truth or not bool((batch.labels[:, 1:] != IGNORED).any()):
            return loss
        return loss + self.truth * next_token_loss(logits, batch.labels)

    def _says_next(self, batch: LessonBatch) -> bool:
        """Whether the model says at each position what comes next: it knows the tokens before, and not those behind."""
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
            said = self._logits(batch)
            again = self._logits(dataclasses.replace(batch, inputs={**batch.inputs, **other}))
        if said.shape[:2] != counted.shape:
            return False
        return bool((said - again)[:, :-1].abs().max() <= TOLERANCE * said.abs().max())

    def _divergence(self, batch: LessonBatch) -> torch.Tensor:
        return divergence(self._logits(batch), batch)

    def _logits(self, batch: LessonBatch) -> torch.Tensor:
        return logits_of(self.learned.run(self.graph_module, self.numbers), batch.inputs)


def _share(step: int, steps: int) -> float:
    """Of the rate, at a step: the first steps of Adam are as long as any, and know the least."""
    return min(1.0, (step + 1) * _RISE / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True, eq=False)
class TunePass(Pass):
    """The slim model says what the dense one said, as nearly as a few vectors in it can make it.

    All weights are frozen. What is learned is a scale ``1 + 0.5 tanh(t)`` for each input and output of each product
    with a weight, and what is added to parameters of one axis, such as those of norms and biases, by Adam on the
    Kullback-Leibler divergence from the dense model. No gradient of a weight is needed, so memory is that of the
    activations of a batch. In the end all of it is folded into the weights: classes, names and sizes stay the same.

    With ``truth``, the next tokens of the text itself count beside what the dense model says of them: perplexity on
    plain text falls further, by what the slim model learns of such text and no longer has of the dense one.

    Now and then the divergence is measured on held-out samples. The numbers that did best there are folded in, so that
    the model is never worse on them than it was; where ``patience`` measurements did no better, it stops.

    What was verified is that removing equals masking; it was before, and the sizes are the same.

    Args:
        epochs: how often each sample is learned from.
        rate: of Adam, at most: it rises over the first tenth of the steps and falls to 0 along a cosine.
        batch: samples in a step.
        everywhere: scale the inputs and outputs of all products; without, of those that lost inputs alone, which learns
            less, and does best at four times the rate.
        rank: of what is added to the weight of each of these products, beside the scales, as in LoRA; 0 for nothing. It
            learns more from much text, and more of what is peculiar to little text.
        weights: learn the weights of these products themselves, and the parameters of one axis, in the place of scales.
            It learns the most, and takes five times the memory of these weights beside them: gradients, two moments,
            themselves and the best so far. Each moves by a part of its root mean square, so that a rate means the same
            for models of all sizes.
        truth: weight of the cross-entropy of the samples' own next tokens beside the divergence; of no weight for a
            model that says something else, which is tried on a batch: what it says may not depend on later tokens.
        precision: of the products in a step and a measurement: ``bf16``, ``float32``, or ``auto``, which is ``bf16``
            where the device computes in it itself and no op of the graph refuses it. What is learned stays in float32.
        measurements: how often the held-out samples are read.
        patience: how many measurements may do no better before it stops.
        folder: where progress is written, and read again by a run with the same arguments; none is without one.
        seed: for the order of the samples.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "tune"
    stage: ClassVar[str] = "tune"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Teacher, Removed, Runnable, Shaped)
    drops: ClassVar[tuple[type[Fact], ...]] = (Teacher,)
    keeps: ClassVar[tuple[type[Fact], ...]] = (Verified,)

    epochs: float = 2.0
    rate: float = 0.005
    batch: int = 4
    everywhere: bool = True
    rank: int = 0
    weights: bool = False
    truth: float = 0.0
    precision: str = "auto"
    measurements: int = 8
    patience: int = 3
    folder: str = ""
    seed: int = 0
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("epochs", "rate"):
            object.__setattr__(self, name, number(name, getattr(self, name), above=0))
        object.__setattr__(self, "truth", number("truth", self.truth, least=0))
        for name in ("batch", "measurements", "patience"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "rank", whole_number("rank", self.rank, least=0))
        for name in ("everywhere", "weights"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.weights and self.rank:
            raise ArgumentError(
                "with weights learned themselves nothing is added to them", where="rank", remedy="Leave rank out"
            )
        one_of("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        if self.folder != "":
            object.__setattr__(self, "folder", as_path("folder", self.folder))
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Learn, and fold in what did best.

        Raises:
            CalibrationError: what the model says is not finite.
        """
        facts = facts_of(graph_module)
        teacher = facts[Teacher]
        learned = self._learned(graph_module)
        training = Training(self, graph_module, learned, teacher)
        progress = training.run()
        better = progress.best < progress.first
        if better:
            with torch.no_grad():
                for name, value in list(learned.folded(progress.kept, graph_module)):
                    put_values(graph_module, name, value)
        words = f"from {progress.first:.3f} to {progress.best:.3f} nats a token on {teacher.heldout_from}"
        outcome = f"divergence from the dense model {words}" if better else "nothing was better than no change"
        if training.truth < self.truth:
            add_note(graph_module, "the text itself was not counted in tuning: the model does not say next tokens")
        add_note(graph_module, f"tuned: {learned.count:,} numbers, {len(teacher.lessons)} samples; {outcome}")
        return PassResult(graph_module, better)

    def _learned(self, graph_module: fx.GraphModule) -> Learned:
        removal = facts_of(graph_module)[Removed].removal
        if self.weights:
            return Weights.of(graph_module, removal, self.everywhere)
        return Vectors.of(graph_module, removal, self.everywhere, self.rank)
