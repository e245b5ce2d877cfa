"""Criteria from forward passes: moments of the inputs of each product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, batch_indices, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, Groups, consumers_of, find_consumers
from fxprune.errors import CalibrationError, PassError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import get_tensor, require_weights
from fxprune.masking.parts import Observers, observe_nodes
from fxprune.offload.ranks import all_reduce, batch_for_all, check_enough, deal
from fxprune.pipeline.arguments import argument
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.scores import Scores

from .base import ImportancePass, Positions, axis_sums

__all__ = ["FlapImportancePass", "ForwardImportancePass", "Moments", "WandaImportancePass", "as_rows"]


@dataclass
class Moments:
    """Sums over all tokens of the inputs of a product.

    Args:
        sums: of each input, ``(in,)``.
        squares: of its square, ``(in,)``.
        count: number of tokens.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs ``(tokens, in)``."""
        self.sums += rows.sum(0)
        self.squares += rows.square().sum(0)
        self.count += len(rows)

    def all_reduce(self) -> None:
        count = self.sums.new_full((), self.count, dtype=torch.int64)
        all_reduce((self.sums, self.squares, count))
        self.count = int(count)

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance of each input."""
        spread = self.squares - self.sums.square() / max(self.count, 1)
        return spread.clamp_min(0) / max(self.count - 1, 1)


def as_rows(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Activations as ``(tokens, in)``, where ``dim`` is the axis of the inputs."""
    return value.movedim(dim, -1).flatten(0, -2)


@dataclass(frozen=True, eq=False)
class ForwardImportancePass(ImportancePass):
    """Base of criteria from activations on the calibration samples."""

    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Calibration, Runnable)
    preconditions: ClassVar[tuple[Callable[[fx.GraphModule, str], None], ...]] = (require_weights,)

    samples: int | None = argument(None, "Calibration samples, evenly spread; None for all.", least=1)
    batch: int = argument(8, "Samples that run at once.", least=1)

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        return PassCost(runs=taken, batch=min(self.batch, taken))

    def calibration(self, graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        return spread(facts_of(graph_module)[Calibration].samples, self.samples)

    def observe(
        self, graph_module: fx.GraphModule, watch: Observers, *, in_shards: bool = False, batch_by_batch: bool = True
    ) -> None:
        """Run the graph over the calibration samples and call ``watch`` with values of nodes.

        Args:
            in_shards: each process runs a part of the batches; what is summed must be all-reduced.
            batch_by_batch: every value of a batch comes before those of the next; if False, node by node where that
                saves memory.
        """
        samples = self.calibration(graph_module)
        batch = batch_for_all(self.batch, len(samples)) if in_shards else self.batch
        if in_shards:
            check_enough(samples)
            batches = deal(list(batch_indices(samples, graph_module, batch)))
            samples = tuple(samples[i] for numbers in batches for i in numbers)

        def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
            return tracked(batches, self.name, total)

        observe_nodes(graph_module, samples, watch, batch, track, batch_by_batch=batch_by_batch)

    def moments(self, graph_module: fx.GraphModule, consumers: Sequence[Consumer]) -> dict[Consumer, Moments]:
        """Moments of the inputs of each consumer over the calibration samples."""
        found: dict[tuple[fx.Node, int], Moments] = {}
        watched: dict[fx.Node, list[int]] = {}
        for consumer in consumers:
            dims = watched.setdefault(consumer.source, [])
            if consumer.dim not in dims:
                dims.append(consumer.dim)

        def add(node: fx.Node, value: torch.Tensor) -> None:
            for dim in watched[node]:
                rows = as_rows(value, dim).double()
                empty = Moments(torch.zeros_like(rows[0]), torch.zeros_like(rows[0]))
                found.setdefault((node, dim), empty).add(rows)

        self.observe(graph_module, {node: partial(add, node) for node in watched}, in_shards=True, batch_by_batch=False)
        for moments in found.values():
            moments.all_reduce()
        for consumer in consumers:
            if not bool(found[consumer.source, consumer.dim].squares.isfinite().all()):
                remedy = "Check the weights and the samples"
                raise CalibrationError("its inputs are not finite", where=consumer.name, remedy=remedy)
        return {consumer: found[consumer.source, consumer.dim] for consumer in consumers}

    def consumers(
        self, graph_module: fx.GraphModule, groups: Sequence[Group]
    ) -> list[tuple[Group, tuple[Consumer, ...]]]:
        """Each group with the products that sum over its units; a group must have one."""
        consumers = find_consumers(graph_module.graph, facts_of(graph_module)[Dependencies].axes)
        pairs = [(group, consumers_of(group, consumers)) for group in groups]
        for group, own in pairs:
            if not own:
                raise self.not_scored(group, "weight that sums over its units")
        return pairs

    def readers(self, graph_module: fx.GraphModule, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups with those of their members alone that products sum over; a group must have one."""
        found = []
        for group, consumers in self.consumers(graph_module, groups):
            held = {(consumer.name, consumer.axis) for consumer in consumers}
            found.append(replace(group, members=tuple(m for m in group.members if (m.name, m.axis) in held)))
        return tuple(found)

    def not_scored(self, group: Group, missing: str) -> PassError:
        return PassError(
            f"{group.name}, of the kind {group.kind!r}, has no {missing}",
            where=f"pass {self.name}",
            remedy="Leave that kind out, or score it by another importance, such as taylor",
        )


@dataclass(frozen=True, eq=False)
class WandaImportancePass(ForwardImportancePass):
    """Scores weights by their magnitude times the root mean square of their input; slices by the sum.

    With weight ``W (out, in)`` and inputs ``X (tokens, in)``, the element ``(o, i)`` counts as::

        |W_oi| * norm(X_i) / sqrt(tokens)

    Parameters in no product with activations, such as biases and weights of norms, count as multiplying ones.

    Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv
    2306.11695), equation 1, there for single weights.
    """

    name: ClassVar[str] = "wanda"
    prefetches: ClassVar[bool] = True

    readers_only: bool = argument(
        False,
        """Count the weights that read a unit alone, if there are any. Those that compute it have other units as inputs,
        whose norms say nothing about this one; a few of them are often hundreds of times the others.""",
    )

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        if self.readers_only:
            consumers = find_consumers(graph_module.graph, facts_of(graph_module)[Dependencies].axes)
            read = [group for group in groups if consumers_of(group, consumers)]
            others = tuple(group for group in groups if group not in read)
            groups = (*self.readers(graph_module, read), *others)
        return super().score(graph_module, groups)

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        axes = facts_of(graph_module)[Dependencies].axes
        names = {name for name, _ in wanted}
        consumers = [c for c in find_consumers(graph_module.graph, axes) if c.name in names]
        uses: dict[str, dict[int, list[Moments]]] = {}
        for consumer, moments in self.moments(graph_module, consumers).items():
            uses.setdefault(consumer.name, {}).setdefault(consumer.axis, []).append(moments)
        found: Positions = {}
        for name in names:
            weight = get_tensor(graph_module, name).detach().float().abs()
            for axis, there in uses.get(name, {}).items():
                squares = torch.stack([moments.squares for moments in there]).sum(0)
                rms = (squares / max(sum(moments.count for moments in there), 1)).sqrt().float().to(weight.device)
                weight = weight * rms.view(-1, *[1] * (weight.dim() - axis - 1))
            found.update({key: axis_sums(weight, key[1]) for key in wanted if key[0] == name})
        return found


@dataclass(frozen=True, eq=False)
class FlapImportancePass(ForwardImportancePass):
    """Scores units by the variance of their outputs: a constant can be compensated by a bias.

    With the consumer's weight ``W (out, in)`` and inputs ``X (tokens, in)``, the input ``i`` counts as::

        var(X_i) * sum over o of W_oi ** 2

    and a unit as the sum over its inputs, in all consumers.

    Source: An, Zhao, Yu, Tang, Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv
    2312.11983): the weighted fluctuation of inputs, and its standardised form.
    """

    name: ClassVar[str] = "flap"
    prefetches: ClassVar[bool] = True

    standardise: bool = argument(
        False,
        """Subtract from the scores of a group their mean and divide by their standard deviation, which makes layers and
        kinds comparable: what the paper does before ``ranking="global"``.""",
    )

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        scores = super().score(graph_module, self.readers(graph_module, groups))
        if not self.standardise:
            return scores
        return Scores({name: (row - row.mean()) / (row.std() or 1.0) for name, row in scores.units.items()})

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = [c for c in find_consumers(graph_module.graph, axes) if (c.name, c.axis) in wanted]
        found: Positions = {}
        for consumer, moments in self.moments(graph_module, consumers).items():
            key = (consumer.name, consumer.axis)
            columns = axis_sums(get_tensor(graph_module, key[0]).detach().double().square(), key[1])
            score = moments.variance * columns.to(moments.sums.device)
            found[key] = found[key] + score if key in found else score
        return found
