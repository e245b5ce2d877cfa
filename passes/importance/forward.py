"""Criteria that need forward passes alone: what weights multiply, and how much it varies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.discovery.consumers import Consumer, consumers_of, find_consumers
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Group, Groups
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import get_tensor, require_weights
from fxprune.pipeline.arguments import flag, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.removal.scores import Scores

from .base import ImportancePass, axis_sums
from .inputs import Moments, input_moments, refuse_group

__all__ = ["FlapImportancePass", "ForwardImportancePass", "WandaImportancePass"]

Positions = dict[tuple[str, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ForwardImportancePass(ImportancePass):
    """A criterion that looks at what the graph computes on the calibration samples.

    Args:
        samples: calibration samples to take, evenly spread; None for all.
        batch: samples that run at once.
        track: shows progress, as ``track(items, what, total)``.
    """

    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Calibration, Runnable)

    samples: int | None = None
    batch: int = 8
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        object.__setattr__(self, "batch", whole_number("batch", self.batch, least=1))
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def tracked(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        """Show progress over batches."""
        return self.track(batches, self.name, total)

    def moments(self, graph_module: fx.GraphModule, consumers: list[Consumer]) -> dict[Consumer, Moments]:
        """Return the moments of what consumers take in, over the calibration samples."""
        return input_moments(graph_module, self.calibration(graph_module), consumers, self.batch, self.tracked)

    def calibration(self, graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        """Return the samples that are taken."""
        return spread(facts_of(graph_module)[Calibration].samples, self.samples)


@dataclass(frozen=True, eq=False)
class WandaImportancePass(ForwardImportancePass):
    """A weight is worth its magnitude times the root mean square of what it multiplies; a slice is worth the sum.

    With weight ``W (out, in)`` and inputs ``X (tokens, in)``, the element ``(o, i)`` counts as::

        |W_oi| * norm(X_i) / sqrt(tokens)

    What is in no product with activations, such as a bias or the weight of a norm, multiplies ones.

    Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv
    2306.11695), equation 1, there for single weights.
    """

    name: ClassVar[str] = "wanda"
    carries: ClassVar[bool] = True

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        """Slice sums of ``|W| * norm(X) / sqrt(tokens)``."""
        axes = facts_of(graph_module)[Dependencies].axes
        names = {name for name, _ in wanted}
        consumers = [c for c in find_consumers(graph_module.graph, axes) if c.name in names]
        uses: dict[str, dict[int, list[Moments]]] = {}
        for consumer, moments in self.moments(graph_module, consumers).items():
            uses.setdefault(consumer.name, {}).setdefault(consumer.axis, []).append(moments)
        found: Positions = {}
        for name in names:
            weight = get_tensor(graph_module, name).detach().float().abs()
            for axis, moments_there in uses.get(name, {}).items():
                rms = _pooled(moments_there).sqrt().float().to(weight.device)
                weight = weight * rms.view(-1, *[1] * (weight.dim() - axis - 1))
            found.update({key: axis_sums(weight, key[1]) for key in wanted if key[0] == name})
        return found


@dataclass(frozen=True, eq=False)
class FlapImportancePass(ForwardImportancePass):
    """A unit is worth how much what it hands on varies, since what is constant can be made up for.

    With the consumer's weight ``W (out, in)`` and inputs ``X (tokens, in)``, the input ``i`` counts as::

        var(X_i) * sum over o of W_oi ** 2

    and a unit as the sum over its inputs, in all consumers.

    Source: An, Zhao, Yu, Tang, Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv
    2312.11983): the weighted fluctuation of inputs, and its standardised form.

    Args:
        standardise: scores of a group less their mean, over their standard deviation, so that they can be compared
            between layers and kinds: what the paper does before ``ranking="global"``.
    """

    name: ClassVar[str] = "flap"
    carries: ClassVar[bool] = True

    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no flag."""
        super().__post_init__()
        object.__setattr__(self, "standardise", flag("standardise", self.standardise))

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """Scores of the consumers alone.

        Raises:
            PassError: nothing adds up over the units of a group.
        """
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        taking = []
        for group in groups:
            held = {(c.name, c.axis) for c in consumers_of(group, consumers)}
            if not held:
                raise refuse_group(group, self.name, "weight that adds up over its units")
            members = tuple(m for m in group.members if (m.name, m.axis) in held)
            taking.append(replace(group, members=members))
        scores = super().score(graph_module, tuple(taking))
        if not self.standardise:
            return scores
        return Scores({name: (row - row.mean()) / (row.std() or 1.0) for name, row in scores.units.items()})

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        """``var(X_i) * sum of W_oi ** 2`` for each input."""
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = [c for c in find_consumers(graph_module.graph, axes) if (c.name, c.axis) in wanted]
        found: Positions = {}
        for consumer, moments in self.moments(graph_module, consumers).items():
            key = (consumer.name, consumer.axis)
            columns = axis_sums(get_tensor(graph_module, key[0]).detach().double().square(), key[1])
            score = moments.variance * columns.to(moments.sums.device)
            found[key] = found[key] + score if key in found else score
        return found


def _pooled(moments: list[Moments]) -> torch.Tensor:
    """Return the mean square over the tokens of all."""
    squares = torch.stack([each.squares for each in moments]).sum(0)
    return squares / max(sum(each.count for each in moments), 1)
