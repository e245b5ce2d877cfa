"""Interactions of units, by the Fisher matrix of gates at each unit: which of them can be removed *together*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Sample, batched, clear_sample_errors
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import device_of, require_weights
from fxprune.masking.masked_run import GatedRun, spread_gates
from fxprune.masking.objective import sample_loss
from fxprune.offload.ranks import all_reduce, deal
from fxprune.pipeline.arguments import argument
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.scores import Scores
from fxprune.trace.fidelity import require_gradients

from .forward import ForwardImportancePass
from .reconstruction import Costs, increasing_costs, unit_count

__all__ = ["FisherImportancePass", "greedy_costs"]


@dataclass(frozen=True, eq=False)
class FisherImportancePass(ForwardImportancePass):
    """Scores units by removing them one after the other, first those that cost least together with all removed before.

    A gate of 1 multiplies each unit at its consumers. Let ``g_s (units,)`` be the gradient of the loss of sample ``s``
    by the gates: the sum over a unit's slice of weight times gradient, but without the gradient of any weight. To
    second order, removing the set ``S`` increases the loss by::

        1/2 1' F_SS 1,   F = mean over samples of g_s g_s'

    ``F`` has the rank of the number of samples, and is never formed: with the sums ``r_s`` of ``g_s`` over removed
    units, the next unit ``u`` costs::

        1/2 mean over s of g_su ** 2 + (1 - shrinkage) * max(mean over s of r_s g_su, 0)

    So units that do the same cost more together. That units compensate for each other counts for nothing: among many
    units there are always some whose gradients on a few samples happen to cancel, important ones too. All units of a
    kind are in one order; the score of a unit is its cost at its turn, or the largest cost before it.

    Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656), section 4: the
    Fisher matrix of masks, there diagonal and then in blocks, one for each layer.
    """

    name: ClassVar[str] = "fisher"
    preconditions = (require_weights, require_gradients)

    shrinkage: float = argument(
        0.5,
        "How much less interactions count than estimated, in [0, 1]; at 1 the diagonal alone counts.",
        least=0,
        most=1,
    )
    steps: int = argument(256, "Steps for each kind; the same number of units is removed in each.", least=1)

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        return PassCost(runs=3.0 * taken, batch=min(self.batch, taken), backward=True, outputs=3)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        begins = dict(zip((g.name for g in groups), np.cumsum([0, *map(unit_count, groups)]).tolist(), strict=False))
        rows = self._gradients(graph_module, groups, begins)
        units: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        for kind in dict.fromkeys(group.kind for group in groups):
            alike = [group for group in groups if group.kind == kind]
            columns = np.concatenate([begins[g.name] + np.arange(unit_count(g)) for g in alike])
            costs = greedy_costs(rows[:, torch.from_numpy(columns)], self.shrinkage, self.steps)
            ends = np.cumsum([unit_count(g) for g in alike])
            for group, row in zip(alike, np.split(costs, ends[:-1]), strict=True):
                units[group.name] = row if group.outer is None else row.reshape(group.outer.size, group.size)
        return Scores(units)

    def _gradients(
        self, graph_module: fx.GraphModule, groups: tuple[Group, ...], begins: Mapping[str, int]
    ) -> torch.Tensor:
        """The gradient of each sample's loss by the gates: ``(samples, units)``."""
        axes = facts_of(graph_module)[Dependencies].axes
        places = [
            (slice(begins[group.name], begins[group.name] + unit_count(group)), one, units_at(group, one, axes))
            for group, consumers in self.consumers(graph_module, groups)
            for one in consumers
        ]
        gates = torch.ones(sum(map(unit_count, groups)), device=device_of(graph_module), requires_grad=True)
        samples = self.calibration(graph_module)
        rows = gates.detach().new_zeros(max(1, len(samples)), len(gates))
        mine = deal(range(len(samples)))
        for number in tracked(mine, self.name, len(mine)):
            by_consumer: dict[Consumer, torch.Tensor] = {}
            for span, consumer, units in places:
                gate = spread_gates(gates[span], units)
                by_consumer[consumer] = by_consumer[consumer] * gate if consumer in by_consumer else gate
            loss = self._loss(graph_module, number, samples[number], by_consumer)
            rows[number] = torch.autograd.grad(loss, gates)[0]
        all_reduce([rows])  # of each row, all but one are zeros
        return rows

    def _loss(
        self, graph_module: fx.GraphModule, number: int, sample: Sample, gates: Mapping[Consumer, torch.Tensor]
    ) -> torch.Tensor:
        inputs = batched([sample], graph_module)
        with clear_sample_errors(inputs):
            output = GatedRun(graph_module, gates).run(*inputs.values())
        loss = sample_loss(graph_module, output, sample, number, self.name)
        if not bool(loss.isfinite()):
            remedy = "Check the weights and the samples"
            raise CalibrationError(f"the loss is {loss.item()}", where="calibration", remedy=remedy)
        return loss


def greedy_costs(rows: torch.Tensor, shrinkage: float, steps: int) -> Costs:
    """Costs ``(units,)``, increasing in the order of removal, from gradients by gates ``rows (samples, units)``."""
    samples, count = rows.shape
    alone = rows.double().square().sum(0).div_(2 * samples).cpu().numpy()
    left, order, costs = np.arange(count), [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    removed = rows.new_zeros(samples)
    each = max(1, -(-count // steps))
    while len(left):
        together = ((removed @ rows) * ((1 - shrinkage) / samples)).clamp_min(0).double().cpu().numpy()[left]
        found = alone[left] + together
        picked = np.argpartition(found, each)[:each] if each < len(left) else np.arange(len(left))
        picked = picked[np.argsort(found[picked], kind="stable")]
        order.append(left[picked])
        costs.append(found[picked])
        removed += rows[:, torch.from_numpy(left[picked]).to(rows.device)].sum(1)
        left = np.delete(left, picked)
    scores = np.zeros(count)
    floor = 1e-9 * float(alone.mean()) if count else 0.0
    scores[np.concatenate(order)] = increasing_costs(np.concatenate(costs), floor)
    return scores
