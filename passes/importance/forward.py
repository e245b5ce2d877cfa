"""Criteria from forward passes: moments of what each product reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, Groups, consumers_of, find_consumers
from fxprune.errors import CalibrationError, PassError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import get_tensor, require_weights
from fxprune.masking.parts import observe
from fxprune.offload.ranks import add_up, own
from fxprune.pipeline.arguments import flag, whole_number
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.removal.scores import Scores

from .base import ImportancePass, axis_sums

__all__ = [
    "FlapImportancePass",
    "ForwardImportancePass",
    "Moments",
    "WandaImportancePass",
    "input_moments",
    "refuse_group",
    "rows_of",
]


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

    def add_up(self) -> None:
        """Make it the sums of all processes, where several share the samples."""
        count = self.sums.new_full((), self.count, dtype=torch.int64)
        add_up((self.sums, self.squares, count))
        self.count = int(count)

    @property
    def mean_square(self) -> torch.Tensor:
        """The mean square of each input."""
        return self.squares / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each input, with one less than the number of tokens below."""
        spread = self.squares - self.sums.square() / max(self.count, 1)
        return spread.clamp_min(0) / max(self.count - 1, 1)


def rows_of(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Return activations as ``(tokens, in)``, where ``dim`` is the axis of the inputs."""
    return value.movedim(dim, -1).flatten(0, -2)


def input_moments(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    consumers: Sequence[Consumer],
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> dict[Consumer, Moments]:
    """Return the moments of what each consumer takes in.

    Raises:
        CalibrationError: an input is not finite.
    """
    found: dict[tuple[fx.Node, int], Moments] = {}
    watched: dict[fx.Node, list[int]] = {}
    for consumer in consumers:
        dims = watched.setdefault(consumer.source, [])
        if consumer.dim not in dims:
            dims.append(consumer.dim)

    def add(node: fx.Node, value: torch.Tensor) -> None:
        for dim in watched[node]:
            rows = rows_of(value, dim).double()
            sums = found.setdefault((node, dim), Moments(torch.zeros_like(rows[0]), torch.zeros_like(rows[0])))
            sums.sums += rows.sum(0)
            sums.squares += rows.square().sum(0)
            sums.count += len(rows)

    seen = {node: partial(add, node) for node in watched}
    observe(graph_module, own(samples), seen, batch, track, in_turn=False)
    for moments in found.values():
        moments.add_up()
    for consumer in consumers:
        if not bool(found[consumer.source, consumer.dim].squares.isfinite().all()):
            raise CalibrationError(
                "its inputs are not finite", where=consumer.name, remedy="Check the weights and the samples"
            )
    return {consumer: found[consumer.source, consumer.dim] for consumer in consumers}


def refuse_group(group: Group, name: str, what: str) -> PassError:
    """Return the error for a group that a criterion says nothing about.

    Args:
        group: the group.
        name: the pass.
        what: what the group would have to have.
    """
    return PassError(
        f"{group.name}, of the kind {group.kind!r}, has no {what}",
        where=f"pass {name}",
        remedy="Leave that kind out, or score it by another importance, such as taylor",
    )


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
