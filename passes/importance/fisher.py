"""Interactions of units: which of them can go *together*, by the Fisher matrix of gates at each unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Sample, batched, computing, next_token_loss, require_logits
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, consumers_of, find_consumers, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import device_of
from fxprune.masking.masked_run import GatedRun, output_tensors, spread_gates
from fxprune.pipeline.arguments import number, whole_number
from fxprune.removal.scores import Scores
from fxprune.trace.fidelity import require_gradients

from .forward import ForwardImportancePass, refuse_group
from .gram import growing

__all__ = ["FisherImportancePass", "greedy_costs"]

Units = np.ndarray[tuple[int], np.dtype[np.int64]]
Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Places = tuple[tuple[Group, Consumer, Units], ...]


@dataclass(frozen=True, eq=False)
class FisherImportancePass(ForwardImportancePass):
    """Units go one after the other, those first that cost least together with all that went before.

    A gate of 1 multiplies each unit where it is taken in. Let ``g_s (units,)`` be the gradient of the loss of sample
    ``s`` by the gates: the sum over a unit's slice of weight times gradient, but without the gradient of any weight.
    To second order, what the loss grows by as the set ``S`` goes is::

        1/2 1' F_SS 1,   F = mean over samples of g_s g_s'

    ``F`` has the rank of the number of samples, and is never formed: with the sums ``r_s`` of ``g_s`` over what went,
    the next unit ``u`` costs::

        1/2 mean over s of g_su ** 2 + (1 - shrinkage) * max(mean over s of r_s g_su, 0)

    So units that do the same cost more together. That units make up for each other counts for nothing: among many units
    there are always some whose gradients on a few samples happen to cancel, important ones too. All units of a kind
    are in one order; the score of a unit is what it cost at its turn, or what the dearest before it cost.

    Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656), section 4: the
    Fisher matrix of masks, there diagonal and then in blocks, one for each layer.

    Args:
        shrinkage: by how much interactions count less than estimated, in [0, 1]. At 1 this is the diagonal alone.
        steps: turns for a kind; as many units go in each.
    """

    name: ClassVar[str] = "fisher"

    shrinkage: float = 0.5
    steps: int = 256

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        object.__setattr__(self, "shrinkage", number("shrinkage", self.shrinkage, least=0, most=1))
        object.__setattr__(self, "steps", whole_number("steps", self.steps, least=1))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless the graph has the gradients of the module."""
        super().requires(graph_module)
        require_gradients(graph_module, self.name)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """What each unit costs at its turn.

        Raises:
            PassError: nothing adds up over the units of a group.
            CalibrationError: the loss is not finite.
        """
        begins = dict(zip((g.name for g in groups), np.cumsum([0, *map(_count, groups)]).tolist(), strict=False))
        rows = self._gradients(graph_module, groups, begins)
        units: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        for kind in dict.fromkeys(group.kind for group in groups):
            alike = [group for group in groups if group.kind == kind]
            columns = np.concatenate([begins[g.name] + np.arange(_count(g)) for g in alike])
            costs = greedy_costs(rows[:, torch.from_numpy(columns)], self.shrinkage, self.steps)
            for group, row in zip(alike, np.split(costs, np.cumsum([_count(g) for g in alike])[:-1]), strict=True):
                units[group.name] = row if group.outer is None else row.reshape(group.outer.size, group.size)
        return Scores(units)

    def _gradients(
        self, graph_module: fx.GraphModule, groups: tuple[Group, ...], begins: Mapping[str, int]
    ) -> torch.Tensor:
        """The gradient of each sample's loss by the gates: ``(samples, units)``."""
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        places = []
        for group in groups:
            own = consumers_of(group, consumers)
            if not own:
                raise refuse_group(group, self.name, "weight that adds up over its units")
            places += [(group, consumer, units_at(group, consumer, axes)) for consumer in own]
        gates = torch.ones(sum(map(_count, groups)), device=device_of(graph_module), requires_grad=True)
        samples, rows = self.calibration(graph_module), []
        for sample in self.tracked(samples, len(samples)):
            by_consumer: dict[Consumer, torch.Tensor] = {}
            for group, consumer, units in places:
                own_gates = gates[begins[group.name] : begins[group.name] + _count(group)]
                gate = spread_gates(own_gates, units)
                by_consumer[consumer] = by_consumer[consumer] * gate if consumer in by_consumer else gate
            loss = self._loss(graph_module, sample, by_consumer)
            rows.append(torch.autograd.grad(loss, gates)[0])
        return torch.stack(rows) if rows else gates.detach()[None] * 0

    def _loss(
        self, graph_module: fx.GraphModule, sample: Sample, gates: Mapping[Consumer, torch.Tensor]
    ) -> torch.Tensor:
        inputs = batched([sample], graph_module)
        with computing(inputs):
            outputs = output_tensors(GatedRun(graph_module, gates).run(*inputs.values()))
        labels = sample.labels.to(outputs[0].device if outputs else "cpu")
        loss = next_token_loss(require_logits(outputs, labels, self.name), labels)
        if not bool(loss.isfinite()):
            raise CalibrationError(
                f"the loss is {loss.item()}", where="calibration", remedy="Check the weights and the samples"
            )
        return loss


def greedy_costs(rows: torch.Tensor, shrinkage: float, steps: int) -> Array:
    """Return what each unit costs at its turn, in a growing order: ``(units,)``.

    Args:
        rows: gradients by gates, ``(samples, units)``.
        shrinkage: by how much interactions count less.
        steps: turns; as many units go in each, one at least.
    """
    samples, count = rows.shape
    alone = rows.double().square().sum(0).div_(2 * samples).cpu().numpy()
    left, order, costs = np.arange(count), [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    gone = rows.new_zeros(samples)
    each = max(1, -(-count // steps))
    while len(left):
        together = ((gone @ rows) * ((1 - shrinkage) / samples)).clamp_min(0).double().cpu().numpy()[left]
        found = alone[left] + together
        picked = np.argpartition(found, each)[:each] if each < len(left) else np.arange(len(left))
        picked = picked[np.argsort(found[picked], kind="stable")]
        order.append(left[picked])
        costs.append(found[picked])
        gone += rows[:, torch.from_numpy(left[picked]).to(rows.device)].sum(1)
        left = np.delete(left, picked)
    scores = np.zeros(count)
    scores[np.concatenate(order)] = growing(np.concatenate(costs), floor=1e-9 * float(alone.mean()) if count else 0.0)
    return scores


def _count(group: Group) -> int:
    return group.size * (1 if group.outer is None else group.outer.size)
