"""Selection by gates that are trained end to end on the masked graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample
from fxprune.data.samples import check_samples
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Groups, consumers_of, find_consumers, units_at
from fxprune.errors import ArgumentError, PassError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import device_of, require_weights
from fxprune.masking.masked_run import GatedRun, spread_gates
from fxprune.masking.teacher import (
    KEPT_CLASSES,
    DivergenceJudge,
    TeacherBatch,
    TeacherBatches,
    divergence,
    foresee_split,
    logits_use_bf16,
    record_teacher_logits,
    run_logits,
    split_samples,
)
from fxprune.offload.prefetch import autocast, compute_device
from fxprune.offload.ranks import all_reduce
from fxprune.pipeline.arguments import Precision, argument, as_seed
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.removal import Removal, Scores

from .base import Choice, Selection, width_bars
from .ratio import BudgetSolver, SelectByRatioPass

_SOFTNESS = 1.5
"""The scale of ``z`` over which a gate opens."""

_REACH = 0.5
"""A scale stays between a half and one and a half."""


class Gates:
    """Trained gates and scales of the units of all slots, one slot after the other; of each the first option has gates.

    At first the gates give the ``initial`` choices, as nearly as they can.

    Attributes:
        z: the number of each unit, ``(units,)``: the largest stay.
        scales: the number ``s`` of each unit's scale ``1 + 0.5 tanh(s)``.
    """

    def __init__(self, selection: Selection, initial: Sequence[Choice], scales: bool) -> None:
        self.selection = selection
        self.groups = [group for slot in selection.slots if (group := slot.options[0].group) is not None]
        graph_module = selection.graph_module
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        ends = np.cumsum([0, *(group.size for group in self.groups)]).tolist()
        self.spans = [slice(*pair) for pair in pairwise(ends)]
        self.places: list[tuple[slice, Consumer, np.ndarray[tuple[int], np.dtype[np.int64]]]] = []
        for span, group in zip(self.spans, self.groups, strict=True):
            consuming = consumers_of(group, consumers) if group.outer is None else ()
            if not consuming:
                raise PassError(
                    f"{group.name}, of the kind {group.kind!r}, has no place for gates",
                    where="gates",
                    remedy="Leave that kind out",
                )
            self.places += [(span, consumer, units_at(group, consumer, axes)) for consumer in consuming]
        z = []
        for group, (option, count) in zip(self.groups, initial, strict=True):
            # in the order of the scores over a range of 3, 0 between the units that go and those that stay
            rank = np.argsort(np.argsort(selection.scores.units[group.name], kind="stable"))
            gone = count if option == 0 else 0
            z.append(torch.from_numpy(3.0 * (rank - gone + 0.5) / len(rank)).float())
        self.z = torch.cat(z).to(device_of(graph_module)).requires_grad_()
        self.scales = torch.zeros_like(self.z, requires_grad=scales)
        self.trained = [self.z, *([self.scales] if scales else [])]
        solver = BudgetSolver(selection)
        self.target = solver.removed(initial)
        costs = []  # the budget that each unit takes
        for i, group in enumerate(self.groups):
            most = selection.slots[i].options[0].most
            alone = solver.removed([(0, most if j == i else 0) for j in range(len(self.groups))])
            costs.append(np.full(group.size, alone / max(most, 1)))
        self.costs = np.concatenate(costs)

    def by_consumer(self) -> dict[Consumer, torch.Tensor]:
        """The factors of each input of each consumer: the mask, with the gates' gradient, times scales."""
        p = torch.sigmoid(self.z / _SOFTNESS)
        gates = (self.mask() + (p - p.detach())) * (1 + _REACH * torch.tanh(self.scales))
        found: dict[Consumer, torch.Tensor] = {}
        for span, consumer, units in self.places:
            factors = spread_gates(gates[span], units)
            found[consumer] = found[consumer] * factors if consumer in found else factors
        return found

    def mask(self) -> torch.Tensor:
        """1 for each unit that stays and 0 for the others: ``(units,)``."""
        z = self.z.detach().cpu().double().numpy()
        forced = np.zeros(len(z), dtype=bool)
        for span, slot in zip(self.spans, self.selection.slots, strict=True):
            fewest = slot.options[0].size - slot.options[0].most
            forced[span.start + np.argsort(z[span])[-fewest:]] = True
        return torch.from_numpy(project(z, self.costs, self.target, forced)).to(self.z)

    def choices(self) -> list[Choice]:
        """The number of units of each slot to remove, rounded to what may stay."""
        closed = 1 - self.mask().cpu().numpy()
        pairs = zip(self.selection.slots, self.spans, strict=True)
        return [(0, slot.options[0].nearest(int(closed[span].sum()))) for slot, span in pairs]

    def scores(self) -> Scores:
        """The numbers ``z`` as scores; other options of the slots keep theirs."""
        z = self.z.detach().cpu().double().numpy()
        trained = {group.name: z[span] for group, span in zip(self.groups, self.spans, strict=True)}
        return Scores({**self.selection.scores.units, **trained}, "select-by-gates")


def project(z: np.ndarray, costs: np.ndarray, target: float, forced: np.ndarray) -> np.ndarray:
    """The projection of gates onto the budget: 1 for units that stay and 0 for those that go, smallest ``z`` first.

    Units that go cost ``target`` together, as nearly as can be; those ``forced`` stay in any case.
    """
    order = np.argsort(z, kind="stable")
    order = order[~forced[order]]
    gone = np.cumsum(costs[order])
    count = int(np.searchsorted(gone, target * (1 - 1e-9)))
    # one more if that comes nearer to the target
    if count < len(order):
        before = gone[count - 1] if count else 0.0
        count += int(abs(gone[count] - target) <= abs(before - target))
    kept = np.ones(len(z))
    kept[order[:count]] = 0
    return kept


@dataclass(frozen=True, eq=False)
class SelectByGatesPass(SelectByRatioPass):
    """Removes the fraction ``ratio``; which units, in which layers and kinds, is trained by gradient.

    Each unit has one number ``z``; all weights are frozen. At each step the units with the largest ``p = sigmoid(z /
    1.5)`` stay, as many as the budget has room for: ``m`` is 1 for these and 0 for the others. The graph runs with each
    unit multiplied by ``m + p - stop(p)`` at its consumers, so that the loss is that of the mask, and the gradient
    reaches every ``p``. The loss is the Kullback-Leibler divergence from the dense model. Beside its gate each unit
    trains a scale, ``1 + 0.5 tanh(s)``, without which those that stay could not compensate for those that go. Scales
    are dropped in the end: ``least-squares`` and ``tune`` find better ones for the selected units.

    It starts from the selection of ``select-by-ratio``. In the end the two are compared on held-out samples, and the
    better one is taken. The numbers ``z`` are then the scores.

    Source: GRASPrune (gates, projected onto the budget at each step, with scales); Bengio, Léonard, Courville,
    "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432), for the straight-through step.
    """

    name: ClassVar[str] = "select-by-gates"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores, Calibration, Runnable)
    preconditions = (require_weights,)

    epochs: float = argument(2.0, "Epochs over the samples.", above=0)
    rate: float = argument(0.05, "Initial learning rate of Adam; it falls to 0 along a cosine.", above=0)
    scales: bool = argument(True, "Train a scale for each unit in addition to its gate.")
    batch: int = argument(4, "Samples in a step.", least=1)
    samples: int = argument(16, "Held-out samples for the final comparison.", least=1)
    heldout: Any | None = argument(
        None,
        "The held-out samples, in any form that calibration data has; None for calibration samples.",
        check=check_samples,
        spelled=False,
    )
    precision: Precision = argument(
        "auto",
        """Precision of the products in a step: ``bf16``, ``float32``, or ``auto``, which is ``bf16`` if the device
        supports it natively and no op of the graph refuses it. Gates and scales stay in float32.""",
    )
    seed: int = argument(0, "Random seed of the order of the samples.", check=as_seed)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform or isinstance(self.ratio, tuple) or "layer" in self.kinds:
            raise ArgumentError(
                "gates choose single units freely: not the same widths in all layers, a ratio by kind, or whole layers",
                where=f"pass {self.name}",
                remedy="Use select-by-ratio, or leave these out",
            )

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        super().foresee(graph_module, given)
        foresee_split(graph_module, given, self.heldout, self.samples)

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples, samples)
        runs = max(samples - taken, 1) * (1 + 3.0 * self.epochs) + 4.0 * taken
        return PassCost(runs=runs, batch=min(self.batch, samples), backward=True, outputs=3)

    def decide(self, selection: Selection) -> Removal:
        initial = self.choose(selection)
        graph_module = selection.graph_module
        samples, heldout = split_samples(graph_module, self.heldout, self.samples)
        gates = Gates(selection, initial, self.scales)
        self._train(graph_module, gates, samples)
        trained = selection.with_scores(gates.scores())
        solver = BudgetSolver(trained, BudgetSolver(selection).removed(initial))
        choices = solver.repair(gates.choices())
        removals = [selection.removal_for(initial), trained.removal_for(choices)]
        before, after = map(DivergenceJudge(graph_module, heldout, self.batch).divergence, removals)
        better = after < before
        selection.note(
            f"gates: on held-out samples, divergence from the dense model {before:.3f} nats per token "
            f"before and {after:.3f} after" + ("" if better else "; the initial selection was taken")
        )
        for line in width_bars(selection.slots, choices if better else initial):
            selection.note(f"gates: {line}")
        return removals[int(better)]

    def _train(self, graph_module: fx.GraphModule, gates: Gates, samples: Sequence[Sample]) -> None:
        device = compute_device(graph_module)
        bf16 = logits_use_bf16(self.precision, graph_module, samples[0], self.name)
        with autocast(device, bf16):
            recorded = record_teacher_logits(graph_module, samples, KEPT_CLASSES, self.batch, lambda items, _: items)
        batches = TeacherBatches(recorded, graph_module, self.batch, in_shards=True)
        steps = max(1, round(self.epochs * len(batches)))
        adam = torch.optim.Adam(gates.trained, lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for batch in tracked(self._shuffled(batches, steps), self.name, steps):
            run = GatedRun(graph_module, gates.by_consumer())
            with autocast(device, bf16):
                loss = batch.share * divergence(run_logits(run, batch.inputs), batch)
            adam.zero_grad()
            loss.backward()
            all_reduce(numbers.grad for numbers in gates.trained if numbers.grad is not None)
            adam.step()
            schedule.step()

    def _shuffled(self, batches: TeacherBatches, steps: int) -> Iterator[TeacherBatch]:
        generator = torch.Generator().manual_seed(self.seed)
        left: list[int] = []
        for _ in range(steps):
            left = left or torch.randperm(len(batches), generator=generator).tolist()
            yield batches[left.pop()]
