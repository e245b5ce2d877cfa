"""Teacher logits of the dense model, recorded before anything is removed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from statistics import median_low
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.built_in import offline_docstrings
from fxprune.data.calibration import (
    Calibration,
    HeldOut,
    Sample,
    embedding_rows,
    hold_out,
    noised,
    plain_tokens,
    spread,
    token_input,
)
from fxprune.data.samples import check_samples, is_in_memory, read_calibration
from fxprune.data.text import check_tokenizer, token_windows
from fxprune.errors import ArgumentError, CalibrationError, DataError
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.tensors import require_weights
from fxprune.masking.objective import read_heldout
from fxprune.masking.teacher import TeacherLogits, logits_use_bf16, record_teacher_logits
from fxprune.offload.files import cached_tensors, write_cached_tensors
from fxprune.offload.prefetch import autocast, compute_device
from fxprune.pipeline.arguments import Precision, argument, instance
from fxprune.pipeline.contract import Pass, PassCost, PassResult, digest_of, tracked
from fxprune.vocabulary.prune import DenseTeacher


@dataclass(frozen=True, eq=False)
class Teacher(Fact):
    """Logits, of samples to train on and of others for early stopping, whatever becomes of the weights.

    ``heldout_from`` is the source of the held-out samples, in words.
    """

    about: ClassVar[Change] = "nothing"
    train: tuple[TeacherLogits, ...]
    heldout: tuple[TeacherLogits, ...]
    heldout_from: str


HELDOUT = 16
"""Held-out samples: two thousand tokens show whether a model improves, and cost little at each measurement."""


@dataclass(frozen=True, eq=False)
class RecordTeacherPass(Pass):
    """Runs the dense graph over the samples and records top-k logits, for ``tune`` to train on.

    Early stopping by a text of another kind than the training text keeps a tuned model from being good at that one
    alone. With a tokenizer there is such a text: documentation of Python's own library.

    With ``noise``, the logits are those of ``copies`` of each sample, most with some tokens replaced by others. Reading
    a small text several times memorises it; reading it each time with other tokens wrong does not.
    """

    name: ClassVar[str] = "record-teacher"
    stage: ClassVar[str] = "teach"
    changes: ClassVar[Change] = "nothing"
    prefetches: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Fact], ...]] = (Calibration, Runnable)
    preconditions = (require_weights,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Teacher, HeldOut)

    samples: int | None = argument(None, "Calibration samples, evenly spread; None for all.", least=1)
    copies: int = argument(1, "Copies of each sample to record, each with its own noise.", least=1)
    noise: float = argument(
        0.0,
        "Largest fraction of the tokens of a copy that is replaced; one copy in four keeps all of its tokens.",
        least=0,
        below=1,
    )
    heldout: Any | None = argument(
        None,
        """Held-out samples for early stopping, in any form that calibration data has. None for samples of the built-in
        text if there is a tokenizer and the graph takes token ids alone, else for an eighth of the calibration
        samples.""",
        check=check_samples,
        spelled=False,
    )
    tokenizer: Any | None = argument(
        None, "Turns the built-in text into samples.", check=check_tokenizer, spelled=False
    )
    dense: Any | None = argument(
        None,
        """A ``DenseTeacher`` in place of the graph: the dense model, with its own tokens, for a slim model whose
        vocabulary was pruned. Samples that it cannot read are left out.""",
        check=partial(instance, kind=DenseTeacher, wanted="a DenseTeacher, or None"),
        spelled=False,
    )
    kept: int = argument(64, "Classes to record at each position; all others are recorded as one.", least=1)
    batch: int = argument(4, "Samples that run at once.", least=1)
    precision: Precision = argument(
        "auto",
        """Precision of the products: ``bf16``, ``float32``, or ``auto``, which is ``bf16`` if the device supports it
        natively and no op of the graph refuses it.""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies > 1 and not self.noise:
            what = f"{self.copies} copies without noise are all alike"
            remedy = "Pass $noise=0.2, or more epochs to tune: epochs=2"
            raise ArgumentError(what, where="copies", remedy=remedy, argument="copies", value=self.copies)

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        """Refuse samples that cannot be split, or held-out ones that do not fit."""
        splits = self.tokenizer is None if self.heldout is None else is_in_memory(self.heldout)
        if Calibration in given and splits:
            self._split(spread(facts_of(graph_module)[Calibration].samples, self.samples), graph_module)

    def cost(self, samples: int) -> PassCost:
        recorded = self.copies * min(self.samples or samples, samples)
        return PassCost(runs=recorded + HELDOUT, batch=min(self.batch, recorded), outputs=4, recorded=recorded)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        samples, heldout, source = self._split(samples, graph_module)
        facts = facts_of(graph_module)
        if self.dense is not None:
            train, stopping = (self._taught(self.dense, group, graph_module) for group in (samples, heldout))
        else:
            bf16 = logits_use_bf16(self.precision, graph_module, samples[0], self.name)
            samples = self._with_noise(samples, graph_module)
            with autocast(compute_device(graph_module), bf16):
                recorded = self._recorded(graph_module, (*samples, *heldout))
            train, stopping = recorded[: len(samples)], recorded[len(samples) :]
        facts.put(Teacher(train, stopping, source))
        facts.put(HeldOut(tuple(one.sample for one in stopping)))
        return PassResult(graph_module, False)

    def _recorded(self, graph_module: fx.GraphModule, samples: tuple[Sample, ...]) -> tuple[TeacherLogits, ...]:
        """Logits of the graph, or those that an interrupted run recorded of the same samples."""
        read = [value for one in samples for value in one.inputs.values() if isinstance(value, torch.Tensor)]
        name = f"teacher-{hashlib.sha256(''.join(map(digest_of, read)).encode()).hexdigest()[:16]}.safetensors"
        known = cached_tensors(name)
        if known is not None:
            return tuple(
                TeacherLogits(one, known[f"classes.{i}"], known[f"likelihoods.{i}"]) for i, one in enumerate(samples)
            )
        found = record_teacher_logits(
            graph_module, samples, self.kept, self.batch, lambda one, total: tracked(one, "dense model", total)
        )
        held = {f"classes.{i}": one.classes for i, one in enumerate(found)}
        held |= {f"likelihoods.{i}": one.likelihoods for i, one in enumerate(found)}
        write_cached_tensors(name, held)
        return found

    def _taught(
        self, dense: DenseTeacher, samples: tuple[Sample, ...], graph_module: fx.GraphModule
    ) -> tuple[TeacherLogits, ...]:
        """Logits of the dense model with other tokens, of the samples that it can read."""
        name, found = token_input(graph_module), []
        for sample in tracked(samples, "dense model", len(samples)):
            logarithms = None if name is None else dense.log_probabilities(sample.inputs[name][0])
            if logarithms is not None:
                found.append(TeacherLogits.of(sample, logarithms, self.kept))
        if not found:
            what = "the dense model, which has other tokens, can read none of them"
            raise CalibrationError(what, where="calibration", remedy="Calibrate on text")
        return tuple(found)

    def _with_noise(self, samples: tuple[Sample, ...], graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        """Noisy copies of the samples; the samples themselves if the graph looks up no token."""
        if not self.noise:
            return samples
        name = token_input(graph_module)
        if name is None:
            add_note(graph_module, "tuning trains on the samples without noise: the graph looks up no token")
            return samples
        vocabulary = plain_tokens(self.tokenizer, embedding_rows(graph_module)[name])
        return noised(samples, name, self.copies, self.noise, vocabulary, 0)

    def _split(
        self, samples: tuple[Sample, ...], graph_module: fx.GraphModule
    ) -> tuple[tuple[Sample, ...], tuple[Sample, ...], str]:
        """Samples to train on, held-out samples, and the source of the latter."""
        if self.heldout is not None:
            return samples, read_heldout(self.heldout, graph_module), "the held-out samples given"
        heldout = self._built_in(samples, graph_module)
        if heldout:
            return samples, heldout, "built-in text of another kind"
        heldout, rest = hold_out(samples, max(1, len(samples) // 8))
        if not rest:
            what, remedy = "one sample is too few to train on and to hold out", "Pass more samples, or a tokenizer"
            raise CalibrationError(what, where="calibration", remedy=remedy)
        return rest, heldout, "calibration samples held out"

    def _built_in(self, samples: tuple[Sample, ...], graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        """Samples of built-in text, as long as the others; none without a tokenizer, or if ids alone are no sample."""
        taken = [name for name, value in samples[0].inputs.items() if isinstance(value, torch.Tensor)]
        if self.tokenizer is None or taken != [token_input(graph_module)]:
            return ()
        tokens = int(median_low(sample.inputs[taken[0]].shape[-1] for sample in samples))
        try:
            windows = token_windows(self.tokenizer, offline_docstrings(), tokens)
        except DataError:  # samples longer than all of the text
            return ()
        return spread(read_calibration(windows, graph_module), HELDOUT)
