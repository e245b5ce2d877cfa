"""Selection by gates learned end to end on the masked graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample
from fxprune.data.samples import check_kind
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Groups, consumers_of, find_consumers, units_at
from fxprune.errors import ArgumentError, PassError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import device_of, require_weights
from fxprune.masking.masked_run import GatedRun, spread_gates
from fxprune.masking.teacher import LessonBatch, divergence, learn, lesson_batches, logits_of, narrowed_by
from fxprune.offload.prefetch import autocast, place_of
from fxprune.pipeline.arguments import PRECISIONS, as_seed, flag, number, one_of, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

from .base import Choice, Selection
from .judge import DivergenceJudge, heldout_parts, picture
from .ratio import BudgetSolver, SelectByRatioPass

__all__ = ["Gates", "SelectByGatesPass", "project"]

_SOFTNESS = 1.5
"""Over which numbers turn a gate from closed to open."""

_SPREAD = 3.0
"""Between the numbers of the least and the most important unit of a group, to begin with."""

_REACH = 0.5
"""A scale stays between a half and one and a half."""


class Gates:
    """Numbers of all units of all slots, one slot after the other.

    Args:
        selection: whose slots; of each the first option has gates.
        begun: choices that the gates give to begin with, as near as they can.
        scales: whether units have scales.
    """

    def __init__(self, selection: Selection, begun: Sequence[Choice], scales: bool) -> None:
        self.selection = selection
        self.groups = []
        for slot in selection.slots:
            group = slot.options[0].group
            assert group is not None
            self.groups.append(group)
        graph_module = selection.graph_module
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        self.begins = np.cumsum([0, *(group.size for group in self.groups)])
        self.places: list[tuple[int, Consumer, np.ndarray[tuple[int], np.dtype[np.int64]]]] = []
        for i, group in enumerate(self.groups):
            own = consumers_of(group, consumers) if group.outer is None else ()
            if not own:
                raise PassError(
                    f"{group.name}, of the kind {group.kind!r}, has no place for gates",
                    where="gates",
                    remedy="Leave that kind out",
                )
            self.places += [(i, consumer, units_at(group, consumer, axes)) for consumer in own]
        device = device_of(graph_module)
        self.numbers = torch.cat([*map(self._first, range(len(self.groups)), begun)]).to(device).requires_grad_()
        self.scales = torch.zeros_like(self.numbers, requires_grad=scales)
        self.costs, self.forced, self.target = self._costs(begun)
        self.learned = [self.numbers, *([self.scales] if scales else [])]

    def by_consumer(self) -> dict[Consumer, torch.Tensor]:
        """Return what multiplies each input of each consumer: the mask, with the gates' gradient, times scales."""
        p = torch.sigmoid(self.numbers / _SOFTNESS)
        gates = (self.mask() + (p - p.detach())) * (1 + _REACH * torch.tanh(self.scales))
        found: dict[Consumer, torch.Tensor] = {}
        for i, consumer, units in self.places:
            spread = spread_gates(gates[self.begins[i] : self.begins[i + 1]], units)
            found[consumer] = found[consumer] * spread if consumer in found else spread
        return found

    def mask(self) -> torch.Tensor:
        """Return 1 for each unit that stays and 0 for the others: ``(units,)``."""
        numbers = self.numbers.detach().cpu().double().numpy()
        kept = project(numbers, self.costs, self.target, self._forced(numbers))
        return torch.from_numpy(kept).to(self.numbers)

    def choices(self) -> list[Choice]:
        """Return how many units of each slot go, rounded to what may stay."""
        gone = 1 - self.mask().cpu().numpy()
        counts = [int(gone[self.begins[i] : self.begins[i + 1]].sum()) for i in range(len(self.groups))]
        return [(0, slot.options[0].nearest(n)) for slot, n in zip(self.selection.slots, counts, strict=True)]

    def scores(self) -> Scores:
        """Return the numbers as scores; other options of the slots keep theirs."""
        numbers = self.numbers.detach().cpu().double().numpy()
        own = {g.name: numbers[self.begins[i] : self.begins[i + 1]] for i, g in enumerate(self.groups)}
        return Scores({**self.selection.scores.units, **own}, "select-by-gates")

    def _first(self, i: int, choice: Choice) -> torch.Tensor:
        """Numbers in the order of the scores, 0 between what goes and what stays."""
        scores = self.selection.scores.units[self.groups[i].name]
        rank = np.argsort(np.argsort(scores, kind="stable"))
        count = choice[1] if choice[0] == 0 else 0
        return torch.from_numpy(_SPREAD * (rank - count + 0.5) / len(rank)).float()

    def _costs(self, begun: Sequence[Choice]) -> tuple[np.ndarray, list[int], float]:
        """What each unit costs, how many of each slot have to stay, and how much has to go."""
        solver = BudgetSolver(self.selection, 0.0)
        none = [(0, 0)] * len(self.groups)
        costs = []
        for i, slot in enumerate(self.selection.slots):
            most = slot.options[0].most
            alone = solver.removed([*none[:i], (0, most), *none[i + 1 :]])
            costs.append(np.full(self.groups[i].size, alone / max(most, 1)))
        fewest = [slot.options[0].size - slot.options[0].most for slot in self.selection.slots]
        return np.concatenate(costs), fewest, solver.removed(begun)

    def _forced(self, numbers: np.ndarray) -> np.ndarray:
        """The units that stay in any case: the best of each slot."""
        forced = np.zeros(len(numbers), dtype=bool)
        for i, fewest in enumerate(self.forced):
            begin, end = self.begins[i], self.begins[i + 1]
            forced[begin + np.argsort(numbers[begin:end])[-fewest:]] = True
        return forced


def project(
    numbers: np.ndarray,
    costs: np.ndarray,
    target: float,
    forced: np.ndarray,
) -> np.ndarray:
    """Return which units stay, 1 or 0: the smallest numbers go until as much has gone as has to.

    Args:
        numbers: of all units, ``(units,)``.
        costs: what goes with each.
        target: how much has to go.
        forced: units that stay in any case.
    """
    order = np.argsort(numbers, kind="stable")
    order = order[~forced[order]]
    gone = np.cumsum(costs[order])
    count = int(np.searchsorted(gone, target * (1 - 1e-9)))
    # one more if that comes nearer to the target
    if count < len(order):
        before = gone[count - 1] if count else 0.0
        count += int(abs(gone[count] - target) <= abs(before - target))
    kept = np.ones(len(numbers))
    kept[order[:count]] = 0
    return kept


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
        solver = BudgetSolver(learned, BudgetSolver(selection, 0.0).removed(begun))
        choices = solver.repair(gates.choices())
        removals = [selection.removal_for(begun), learned.removal_for(choices)]
        judge = DivergenceJudge(graph_module, heldout, self.batch)
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
