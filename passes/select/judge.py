"""How far a model with units masked is from the dense one, measured on samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.data.samples import read_calibration
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of
from fxprune.graph.fork import fork
from fxprune.graph.shelf import unremembered
from fxprune.masking.lessons import Lesson, divergence, learn, lesson_batches, logits_of
from fxprune.masking.masked_run import MaskedRun
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.progress import no_progress
from fxprune.removal.removal import Removal

__all__ = ["Judge", "heldout_parts", "without"]

_KEPT = 64
"""Likeliest classes that are compared one by one: they hold nearly all of the probability."""


class Judge:
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
