"""A masked model's divergence from the dense one, and budgets as shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.data.samples import read_calibration
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of, fork
from fxprune.masking.masked_run import MaskedRun
from fxprune.masking.teacher import Lesson, divergence, learn, lesson_batches, logits_of
from fxprune.offload.files import unremembered
from fxprune.pipeline.contract import Pass, no_progress
from fxprune.removal.removal import Removal

from .base import Choice, Selection, Slot
from .ratio import BudgetSolver

__all__ = [
    "Allocations",
    "DivergenceJudge",
    "Shares",
    "allocations",
    "heldout_parts",
    "move",
    "picture",
    "shares_of",
    "without",
]

Shares = tuple[float, ...]

_EVEN = 0.002
"""Allocations that remove so much of the whole more or less count as equal: less than a measurement can tell."""

_NEW = 0.25
"""What a slot that loses nothing gets to begin with, of the mean share of those that lose."""

_BARS = "▁▂▃▄▅▆▇█"


class Allocations:
    """Allocations that remove as much as a given one.

    Args:
        selection: what to choose from.
        target: how much goes.
    """

    def __init__(self, selection: Selection, target: float) -> None:
        self.selection, self.target = selection, target

    def choices(self, shares: Shares) -> list[Choice] | None:
        """Return choices by which each slot loses its share; None where that does not remove as much."""
        if not any(shares):
            return None
        solver = BudgetSolver(self.selection, self.target, shares)
        found = solver.repair(solver.local())
        even = abs(solver.removed(found) - self.target) <= _EVEN * self.selection.budget.total
        return found if even else None

    def splits(self) -> Iterator[tuple[str, Shares]]:
        """Yield splits between kinds to begin with: each kind alone, and the smaller ones at half their share."""
        slots = self.selection.slots
        kinds = sorted({slot.kind for slot in slots}, key=lambda kind: -self.selection.sizes.get(kind, 0.0))
        yield "the same share everywhere", (1.0,) * len(slots)
        for kind in kinds if len(kinds) > 1 else ():
            yield f"{kind} alone", tuple(float(slot.kind == kind) for slot in slots)
        if len(kinds) > 1:
            yield f"more from {kinds[0]}", tuple(1.0 if slot.kind == kinds[0] else 0.5 for slot in slots)

    def parts(self, bins: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the numbers of the slots of each kind in each part of the depth."""
        for kind in dict.fromkeys(slot.kind for slot in self.selection.slots):
            places = [place for place, slot in enumerate(self.selection.slots) if slot.kind == kind]
            count = min(bins, len(places))
            for i in range(count):
                part = tuple(places[i * len(places) // count : (i + 1) * len(places) // count])
                yield f"{kind} in part {i + 1} of {count}", part


def allocations(selection: Selection, begun: Sequence[Choice]) -> Allocations:
    """Return allocations that remove as much as ``begun``."""
    return Allocations(selection, BudgetSolver(selection, 0.0).removed(begun))


def shares_of(slots: Sequence[Slot], choices: Sequence[Choice]) -> Shares:
    """Return the shares that choices amount to: the fraction that goes from each slot."""
    return tuple(count / slot.options[i].size for slot, (i, count) in zip(slots, choices, strict=True))


def move(shares: Shares, part: Sequence[int], factor: float) -> Shares:
    """Return shares of which those in ``part`` are multiplied; one of 0 that is to grow gets a small one."""
    losing = [share for share in shares if share]
    new = _NEW * sum(losing) / max(len(losing), 1)
    moved = set(part)
    return tuple(
        share if place not in moved else (share * factor if share or factor < 1 else new)
        for place, share in enumerate(shares)
    )


def picture(slots: Sequence[Slot], choices: Sequence[Choice]) -> Iterator[str]:
    """Yield a line for each kind: what stays of each slot, from front to end, as bars."""
    for kind in dict.fromkeys(slot.kind for slot in slots):
        left = [
            1 - count / slot.options[i].size
            for slot, (i, count) in zip(slots, choices, strict=True)
            if slot.kind == kind
        ]
        bars = "".join(_BARS[min(int(part * len(_BARS)), len(_BARS) - 1)] for part in left)
        yield f"{kind} {bars} {sum(left) / len(left):.0%} left"


_KEPT = 64
"""Likeliest classes that are compared one by one: they hold nearly all of the probability."""


class DivergenceJudge:
    """Measures removals by the Kullback-Leibler divergence from the dense model, in nats a position.

    Args:
        graph_module: the dense graph.
        samples: what it is measured on.
        batch: samples that run at once.
        fit: a compensation to carry out before it is measured; None for none.
        fit_samples: what that is fitted to.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        samples: Sequence[Sample],
        batch: int,
        fit: Pass | None = None,
        fit_samples: Sequence[Sample] = (),
    ) -> None:
        self.graph_module, self.batch = graph_module, batch
        self.fit, self.fit_samples = fit, tuple(fit_samples)
        self.lessons: tuple[Lesson, ...] = learn(
            graph_module, samples, _KEPT, batch, lambda batches, total: no_progress(batches, "", total)
        )

    def divergence(self, removal: Removal) -> float:
        """Return how far the dense graph with a removal masked is from the dense graph."""
        work = self._fitted(removal)
        total = 0.0
        with torch.no_grad():
            for lessons in lesson_batches(self.lessons, self.graph_module, self.batch):
                run = MaskedRun(work, removal.axes, removal.keep, removal.removed_blocks)
                positions = lessons.classes.shape[0] * lessons.classes.shape[1]
                total += float(divergence(logits_of(run, lessons.inputs), lessons)) * positions
        return total / sum(len(lesson.classes) for lesson in self.lessons)

    def _fitted(self, removal: Removal) -> fx.GraphModule:
        if self.fit is None:
            return self.graph_module
        work = fork(self.graph_module)
        facts = facts_of(work)
        facts.put(removal)
        facts.put(Calibration(self.fit_samples))
        with unremembered():  # each trial has a fit of its own, to other weights under the same names
            fitted: fx.GraphModule = self.fit(work, inplace=True).graph_module
        return fitted


def heldout_parts(graph_module: fx.GraphModule, given: Any, most: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return samples to learn from, and samples to compare on in the end.

    Args:
        graph_module: the graph they are for.
        given: samples to compare on; None for a third of the calibration samples, or ``most`` of them.
        most: the most that are taken of these.

    Raises:
        CalibrationError: there is one sample alone.
    """
    samples = facts_of(graph_module)[Calibration].samples
    if given is not None:
        return samples, read_calibration(given, graph_module)
    heldout = spread(samples, min(most, len(samples) // 3 or 1))
    rest = without(samples, heldout)
    if not rest:
        raise CalibrationError(
            "one sample is too few to measure on and to compare on", where="calibration", remedy="Pass more samples"
        )
    return rest, heldout


def without(samples: Sequence[Sample], others: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return the samples that are none of ``others``."""
    ids = {id(other) for other in others}
    return tuple(sample for sample in samples if id(sample) not in ids)
