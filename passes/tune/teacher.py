"""Teacher logits of the dense model, recorded before anything is removed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.built_in import offline_docstrings
from fxprune.data.calibration import Calibration, Sample, embedding_rows, noised, plain_tokens, spread, token_input
from fxprune.data.samples import check_kind, read_calibration
from fxprune.data.text import check_tokenizer, token_windows
from fxprune.errors import ArgumentError, CalibrationError, DataError
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.tensors import require_weights
from fxprune.masking.teacher import Lesson, LessonBatch, divergence, learn, lesson_batches, logits_of, narrowed_by
from fxprune.offload.prefetch import autocast, place_of
from fxprune.pipeline.arguments import PRECISIONS, number, one_of, whole_number
from fxprune.pipeline.contract import Pass, PassResult, Track, check_track, no_progress

__all__ = ["Lesson", "LessonBatch", "RecordTeacherPass", "Teacher", "divergence", "lesson_batches", "logits_of"]


@dataclass(frozen=True, eq=False)
class Teacher(Fact):
    """What the dense model said, for a slim one to say as well. It stays true whatever becomes of the weights.

    Args:
        lessons: to learn from.
        heldout: to stop by; none of it is learned from.
        heldout_from: where the held-out samples come from, in words.
    """

    about: ClassVar[Change] = "nothing"
    lessons: tuple[Lesson, ...]
    heldout: tuple[Lesson, ...]
    heldout_from: str


_HELD = 16
"""Held-out samples: two thousand tokens tell whether a model gets better, and cost little each time they are read."""

_SHARE = 8
"""Without a text of another kind, one in so many calibration samples is held out."""


@dataclass(frozen=True, eq=False)
class RecordTeacherPass(Pass):
    """Runs the dense graph over the samples and puts down the likeliest classes, for ``tune`` to learn from.

    Stopping by a text of another kind than the one that is learned from keeps a tuned model from being good at that one
    alone. With a tokenizer, such a text is there: documentation of Python's own library.

    With ``noise``, what is put down is what the dense model says of ``copies`` of each sample, in most of which some
    tokens are replaced by others. To read a small text several times teaches it by heart; to read it each time with
    other words amiss does not.

    Args:
        samples: calibration samples to take, evenly spread; None for all.
        copies: how often each of these is put down, each time with noise of its own.
        noise: part of the tokens of a copy that is replaced at most; one copy in four keeps them all.
        heldout: samples to stop by, in any form that calibration data has. None for ones of the built-in text where
            there is a tokenizer and the graph takes token ids alone, else for an eighth of the calibration samples.
        tokenizer: turns the built-in text into samples.
        kept: classes to put down at each position; the others count as one.
        batch: samples that run at once.
        precision: of the products: ``bf16``, ``float32``, or ``auto``, which is ``bf16`` where the device computes in
            it itself and no op of the graph refuses it.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "record-teacher"
    stage: ClassVar[str] = "tune"
    changes: ClassVar[Change] = "nothing"
    carries: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Fact], ...]] = (Calibration, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Teacher,)

    samples: int | None = None
    copies: int = 1
    noise: float = 0.0
    heldout: Any = field(default=None, metadata={"spelled": False})
    tokenizer: Any = field(default=None, metadata={"spelled": False})
    kept: int = 64
    batch: int = 4
    precision: str = "auto"
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("kept", "batch", "copies"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        object.__setattr__(self, "noise", number("noise", self.noise, least=0, below=1))
        if self.copies > 1 and not self.noise:
            raise ArgumentError(
                f"{self.copies} copies without noise are all alike",
                where="copies",
                remedy="Say noise=0.2, or let tune read each sample more often: epochs=2",
            )
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        if self.heldout is not None:
            check_kind(self.heldout)
        one_of("precision", self.precision, PRECISIONS)
        check_tokenizer(self.tokenizer)
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run over what is learned from and over what is held out."""
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        samples, heldout, where = self._parted(samples, graph_module)

        def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
            return self.track(batches, "dense model", total)

        narrow = narrowed_by(self.precision, graph_module, samples[0], self.name)
        samples = self._noised(samples, graph_module)
        with autocast(place_of(graph_module), narrow):
            lessons = learn(graph_module, (*samples, *heldout), self.kept, self.batch, track)
        facts_of(graph_module).put(Teacher(lessons[: len(samples)], lessons[len(samples) :], where))
        return PassResult(graph_module, False)

    def _noised(self, samples: tuple[Sample, ...], graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        """The samples, or noisy copies of them; as they are where the graph looks up no token."""
        if not self.noise:
            return samples
        name = token_input(graph_module)
        if name is None:
            add_note(graph_module, "tuning learns from the samples without noise: the graph looks up no token")
            return samples
        vocabulary = plain_tokens(self.tokenizer, embedding_rows(graph_module)[name])
        return noised(samples, name, self.copies, self.noise, vocabulary, 0)

    def _other_kind(self, samples: tuple[Sample, ...], graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        """Samples of built-in text, as long as the others; none without a tokenizer, or if ids alone are no sample."""
        taken = [name for name, value in samples[0].inputs.items() if isinstance(value, torch.Tensor)]
        if self.tokenizer is None or taken != [token_input(graph_module)]:
            return ()
        tokens = int(median_low(sample.inputs[taken[0]].shape[-1] for sample in samples))
        try:
            windows = token_windows(self.tokenizer, offline_docstrings(), tokens)
        except DataError:  # samples longer than all of it
            return ()
        return spread(read_calibration(windows, graph_module), _HELD)

    def _parted(
        self, samples: tuple[Sample, ...], graph_module: fx.GraphModule
    ) -> tuple[tuple[Sample, ...], tuple[Sample, ...], str]:
        """Samples to learn from, samples to stop by, and where the latter come from."""
        if self.heldout is not None:
            return samples, read_calibration(self.heldout, graph_module), "the held-out samples given"
        heldout = self._other_kind(samples, graph_module)
        if heldout:
            return samples, heldout, "built-in text of another kind"
        held = spread(samples, max(1, len(samples) // _SHARE))
        rest = tuple(sample for sample in samples if all(sample is not other for other in held))
        if not rest:
            raise CalibrationError(
                "one sample is too few to learn from and to hold out",
                where="calibration",
                remedy="Pass more samples, or a tokenizer",
            )
        return rest, held, "calibration samples held out"
