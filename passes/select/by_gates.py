"""Which units stay, learned end to end: gates on the masked graph, under the budget at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample
from fxprune.data.samples import check_kind
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError
from fxprune.graph.carrier import place_of
from fxprune.graph.facts import Fact, Runnable
from fxprune.graph.precision import autocast
from fxprune.graph.tensors import require_weights
from fxprune.masking.gated_run import GatedRun
from fxprune.masking.lessons import LessonBatch, divergence, learn, lesson_batches, logits_of, narrowed_by
from fxprune.pipeline.arguments import PRECISIONS, as_seed, flag, number, one_of, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

from .base import Selection
from .gates import Gates
from .judge import Judge, heldout_parts
from .ratio import SelectByRatioPass
from .shares import picture
from .solver import Solver

__all__ = ["SelectByGatesPass"]

_KEPT = 64
"""Likeliest classes that are learned one by one; the others count as one."""


@dataclass(frozen=True, eq=False)
class SelectByGatesPass(SelectByRatioPass):
    """The fraction ``ratio`` goes; which units, in which layers and kinds, is learned by gradient.

    Each unit has one number ``z``; all weights are frozen. At each step the units with the largest ``p = sigmoid(z /
    1.5)`` stay, as many as the budget has room for: ``m`` is 1 for these and 0 for the others. The graph runs with each
    unit multiplied by ``m + p - stop(p)`` where it is taken in, so that the loss is that of the mask, and the gradient
    reaches every ``p``. The loss is the Kullback-Leibler divergence from the dense model. Beside the gates each unit
    learns a scale, ``1 + 0.5 tanh(s)``, without which those that stay could not make up for those that go. Scales
    are left out in the end: ``least-squares`` and ``tune`` find better ones for the units that were found.

    It begins with what ``select-by-ratio`` takes. In the end the two are compared on samples that were not learned
    from, and the better one is taken. The numbers ``z`` are then the scores.

    Source: GRASPrune (gates, projected onto the budget at each step, with scales); Bengio, Léonard, Courville,
    "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432), for the straight-through step.

    Args:
        epochs: how often each sample is learned from.
        rate: of Adam, at first; it falls to 0 along a cosine.
        scales: learn a scale for each unit beside its gate.
        batch: samples in a step.
        samples: held-out samples to compare on in the end.
        heldout: those samples, in any form that calibration data has; None for calibration samples.
        precision: of the products in a step: ``bf16``, ``float32``, or ``auto``, which is ``bf16`` where the device
            computes in it itself and no op of the graph refuses it. Gates and scales stay in float32.
        seed: for the order of the samples.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "select-by-gates"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores, Calibration, Runnable)

    epochs: float = 2.0
    rate: float = 0.05
    scales: bool = True
    batch: int = 4
    samples: int = 16
    heldout: Any = field(default=None, metadata={"spelled": False})
    precision: str = "auto"
    seed: int = 0
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse what gates cannot keep to.

        Raises:
            ArgumentError: the widths have to be uniform, or whole layers may go.
        """
        super().__post_init__()
        for name in ("epochs", "rate"):
            object.__setattr__(self, name, number(name, getattr(self, name), above=0))
        for name in ("batch", "samples"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "scales", flag("scales", self.scales))
        one_of("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        check_track(self.track)
        if self.heldout is not None:
            check_kind(self.heldout)
        if self.uniform or isinstance(self.ratio, tuple) or "layer" in self.kinds:
            raise ArgumentError(
                "gates choose single units freely: not the same widths in all layers, a ratio by kind, or whole layers",
                where=f"pass {self.name}",
                remedy="Use select-by-ratio, or leave these out",
            )

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def decide(self, selection: Selection) -> Removal:
        """What the gates have learned, or the beginning where that does better.

        Raises:
            RatioError: even with one unit left in every group, less than the ratio goes.
            CalibrationError: there is one sample alone.
        """
        begun = self.choose(selection)
        graph_module = selection.graph_module
        lessons, heldout = heldout_parts(graph_module, self.heldout, self.samples)
        gates = Gates(selection, begun, self.scales)
        self._learn(graph_module, gates, lessons)
        learned = selection.by(gates.scores())
        solver = Solver(learned, Solver(selection, 0.0).removed(begun))
        choices = solver.repair(gates.choices())
        removals = [selection.removal_for(begun), learned.removal_for(choices)]
        judge = Judge(graph_module, heldout, self.batch)
        before, after = map(judge.divergence, removals)
        selection.note(
            f"gates: on samples that were not learned from, divergence from the dense model {before:.3f} nats a token "
            f"before and {after:.3f} after" + ("" if after < before else "; the beginning was taken")
        )
        for line in picture(selection.slots, choices if after < before else begun):
            selection.note(f"gates: {line}")
        return removals[int(after < before)]

    def _learn(self, graph_module: fx.GraphModule, gates: Gates, samples: Sequence[Sample]) -> None:
        place = place_of(graph_module)
        narrow = narrowed_by(self.precision, graph_module, samples[0], self.name)
        with autocast(place, narrow):
            lessons = learn(graph_module, samples, _KEPT, self.batch, lambda batches, _: batches)
        batches = list(lesson_batches(lessons, graph_module, self.batch))
        steps = max(1, round(self.epochs * len(batches)))
        adam = torch.optim.Adam(gates.learned, lr=self.rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for batch in self.track(self._order(batches, steps), self.name, steps):
            run = GatedRun(graph_module, gates.by_consumer())
            with autocast(place, narrow):
                loss = divergence(logits_of(run, batch.inputs), batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
            falling.step()

    def _order(self, batches: Sequence[LessonBatch], steps: int) -> Iterator[LessonBatch]:
        """Batches in a new order in each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        left: list[int] = []
        for _ in range(steps):
            left = left or torch.randperm(len(batches), generator=generator).tolist()
            yield batches[left.pop()]
