"""Tune: a few vectors are learned end to end on the slim model, and folded into its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import ArgumentError
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, add_note, facts_of
from fxprune.graph.source import put_values
from fxprune.graph.tensors import require_weights
from fxprune.masking.compare import Verified
from fxprune.pipeline.arguments import PRECISIONS, as_path, as_seed, flag, number, one_of, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.removal.removal import Removed

from .teacher import Teacher
from .training import Learned, Training
from .vectors import Vectors
from .weights import Weights

__all__ = ["TunePass"]


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
