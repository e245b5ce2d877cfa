"""Tune: a few vectors are learned end to end on the slim model, and folded into its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, add_note, facts_of
from fxprune.graph.source import put_values
from fxprune.graph.tensors import device_of, require_weights
from fxprune.masking.compare import Verified
from fxprune.pipeline.arguments import as_path, as_seed, flag, number, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.removal.removal import Removed

from .progress import Progress, read_progress, write_progress
from .teacher import LessonBatch, Teacher, divergence, lesson_batches, logits_of
from .vectors import TunedRun, Vectors

__all__ = ["TunePass"]

_RISE = 10
"""The rate rises over one in so many steps."""


@dataclass(frozen=True, eq=False)
class TunePass(Pass):
    """The slim model says what the dense one said, as nearly as a few vectors in it can make it.

    All weights are frozen. What is learned is a scale ``1 + 0.5 tanh(t)`` for each input and output of each product
    with a weight, and what is added to parameters of one axis, such as those of norms and biases, by Adam on the
    Kullback-Leibler divergence from the dense model. No gradient of a weight is needed, so memory is that of the
    activations of a batch. In the end all of it is folded into the weights: classes, names and sizes stay the same.

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
    measurements: int = 8
    patience: int = 3
    folder: str = ""
    seed: int = 0
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("epochs", "rate"):
            object.__setattr__(self, name, number(name, getattr(self, name), above=0))
        for name in ("batch", "measurements", "patience"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "rank", whole_number("rank", self.rank, least=0))
        object.__setattr__(self, "everywhere", flag("everywhere", self.everywhere))
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
        vectors = Vectors.of(graph_module, facts[Removed].removal, self.everywhere, self.rank)
        training = _Training(self, graph_module, vectors, teacher)
        progress = training.run()
        better = progress.best < progress.first
        if better:
            with torch.no_grad():
                for name, value in list(vectors.folded(progress.kept, graph_module)):
                    put_values(graph_module, name, value)
        words = f"from {progress.first:.3f} to {progress.best:.3f} nats a token on {teacher.heldout_from}"
        outcome = f"divergence from the dense model {words}" if better else "nothing was better than no change"
        add_note(graph_module, f"tuned: {vectors.count:,} numbers, {len(teacher.lessons)} samples; {outcome}")
        return PassResult(graph_module, better)


class _Training:
    """The run of one tuning.

    Args:
        settings: the pass.
        graph_module: the slim graph.
        vectors: what is learned.
        teacher: what the dense model said.
    """

    def __init__(self, settings: TunePass, graph_module: fx.GraphModule, vectors: Vectors, teacher: Teacher) -> None:
        self.settings, self.graph_module, self.vectors = settings, graph_module, vectors
        self.heldout = list(lesson_batches(teacher.heldout, graph_module, settings.batch))
        self.batches = list(lesson_batches(teacher.lessons, graph_module, settings.batch))
        self.numbers = torch.zeros(vectors.count, device=device_of(graph_module), requires_grad=True)
        self.adam = torch.optim.Adam([self.numbers], lr=settings.rate)
        self.steps = max(1, round(settings.epochs * len(self.batches)))

    def run(self) -> Progress:
        """Learn until the end, or until it does no better."""
        progress = self._begun()
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
                kept=self.numbers.detach().clone() if better else progress.kept,
            )
            self._write(progress)
            if progress.misses >= self.settings.patience:
                break
        return progress

    def _begun(self) -> Progress:
        first = self._measure()
        if not math.isfinite(first):
            raise CalibrationError(
                "what the slim model says is not finite", where="tuning", remedy="Check the weights and the samples"
            )
        found = read_progress(self.settings.folder, self._mark(first), self.numbers, self.adam)
        return found or Progress(0, 0, first, first, self.numbers.detach().clone())

    def _write(self, progress: Progress) -> None:
        if self.settings.folder:
            write_progress(self.settings.folder, self._mark(progress.first), progress, self.numbers, self.adam)

    def _mark(self, first: float) -> str:
        """What tells this run from others: its arguments, its vectors, its samples and where it began."""
        return f"{self.settings} {self.vectors.count} {len(self.batches)} {first:.4g}"

    def _order(self) -> Iterator[int]:
        """The batches, shuffled anew each time all have had their turn."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(math.ceil(self.steps / len(self.batches))):
            yield from torch.randperm(len(self.batches), generator=generator).tolist()

    def _learn(self, batch: LessonBatch, step: int) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.settings.rate * _share(step, self.steps)
        with torch.enable_grad():
            loss = divergence(logits_of(TunedRun(self.graph_module, self.vectors, self.numbers), batch.inputs), batch)
            self.adam.zero_grad()
            loss.backward()
        if self.numbers.grad is not None and bool(self.numbers.grad.isfinite().all()):
            self.adam.step()

    def _measure(self) -> float:
        """The divergence on held-out samples, in nats a position."""
        with torch.no_grad():
            found = [
                float(divergence(logits_of(TunedRun(self.graph_module, self.vectors, self.numbers), b.inputs), b))
                * b.classes.shape[:2].numel()
                for b in self.heldout
            ]
        return sum(found) / sum(b.classes.shape[:2].numel() for b in self.heldout)


def _share(step: int, steps: int) -> float:
    """Of the rate, at a step: the first steps of Adam are as long as any, and know the least."""
    return min(1.0, (step + 1) * _RISE / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
