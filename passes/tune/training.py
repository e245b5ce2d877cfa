"""The run of a tuning: steps of Adam, measured now and then on held-out samples, kept where it did best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import fx

from fxprune.data.calibration import IGNORED, next_token_loss
from fxprune.errors import CalibrationError
from fxprune.graph.precision import autocast, narrowed
from fxprune.graph.tensors import device_of, weights
from fxprune.masking.compare import TOLERANCE

from .progress import Progress, digest, read_progress, write_progress
from .teacher import LessonBatch, Teacher, divergence, lesson_batches, logits_of

if TYPE_CHECKING:
    from .tune import TunePass

__all__ = ["Learned", "Training"]

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
