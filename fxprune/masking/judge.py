"""The divergence of a masked model from the dense one, as a measure of selections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.data.samples import is_in_memory
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Fact, facts_of, fork
from fxprune.masking.masked_run import MaskedRun
from fxprune.masking.objective import read_heldout
from fxprune.masking.teacher import (
    divergence,
    logits_use_bf16,
    record_teacher_logits,
    run_logits,
    teacher_batches,
)
from fxprune.offload.files import no_resume
from fxprune.offload.prefetch import autocast, compute_device
from fxprune.offload.ranks import batch_for_all, deal, gathered
from fxprune.pipeline.contract import Pass
from fxprune.removal.removal import Removal

__all__ = ["KEPT_CLASSES", "DivergenceJudge", "foresee_split", "samples_except", "split_samples"]

KEPT_CLASSES = 64
"""Likeliest classes that are compared one by one: they hold nearly all of the probability."""


class DivergenceJudge:
    """Measures removals by the Kullback-Leibler divergence from the dense model, in nats per position.

    Processes share the batches, and all get the same divergence.
    Products are computed in bfloat16 where the device supports it natively: removals differ by more than its digits.
    ``fit`` is a compensation, on ``fit_samples``, to carry out before each measurement.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        samples: Sequence[Sample],
        batch: int,
        fit: Pass | None = None,
        fit_samples: Sequence[Sample] = (),
    ) -> None:
        self.graph_module = graph_module
        self.fit, self.fit_samples = fit, tuple(fit_samples)
        self.device = compute_device(graph_module)
        self.bf16 = logits_use_bf16("auto", graph_module, samples[0], "judge")
        with autocast(self.device, self.bf16):
            teacher = record_teacher_logits(graph_module, samples, KEPT_CLASSES, batch, lambda batches, _: batches)
        batches = tuple(teacher_batches(teacher, graph_module, batch_for_all(batch, len(samples))))
        self.batches, self.positions = deal(batches), sum(batch.positions for batch in batches)

    def divergence(self, removal: Removal) -> float:
        work = self.graph_module
        if self.fit is not None:
            work = fork(self.graph_module)
            facts_of(work).put(removal)
            facts_of(work).put(Calibration(self.fit_samples))
            with no_resume():  # each trial has a fit of its own, of other weights with the same names
                work = self.fit(work, inplace=True).graph_module
        found = []
        with torch.no_grad(), autocast(self.device, self.bf16):
            for batch in self.batches:
                run = MaskedRun(work, removal.axes, removal.keep, removal.removed_blocks)
                found.append(float(divergence(run_logits(run, batch.inputs), batch)) * batch.positions)
        return sum(gathered(found)) / self.positions


def split_samples(graph_module: fx.GraphModule, given: Any, most: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples to select by, and held-out samples for the final comparison.

    Without samples ``given``, a third of the calibration samples is held out, at most ``most``.
    """
    samples = facts_of(graph_module)[Calibration].samples
    if given is not None:
        return samples, read_heldout(given, graph_module)
    heldout = spread(samples, min(most, len(samples) // 3 or 1))
    rest = samples_except(samples, heldout)
    if not rest:
        raise CalibrationError(
            "one sample is too few to measure on and to compare on", where="calibration", remedy="Pass more samples"
        )
    return rest, heldout


def foresee_split(graph_module: fx.GraphModule, known: Sequence[type[Fact]], given: Any, most: int) -> None:
    """Refuse samples that cannot be split, or held-out ones that do not fit, once calibration samples are known."""
    if Calibration in known and (given is None or is_in_memory(given)):
        split_samples(graph_module, given, most)


def samples_except(samples: Sequence[Sample], others: Sequence[Sample]) -> tuple[Sample, ...]:
    """The samples that are not among ``others``."""
    ids = {id(other) for other in others}
    return tuple(sample for sample in samples if id(sample) not in ids)
