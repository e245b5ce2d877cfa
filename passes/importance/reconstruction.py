"""What a unit adds to its consumers that a fit of those that stay cannot give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, consumers_of, find_consumers, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import get_tensor
from fxprune.masking.parts import observe
from fxprune.pipeline.arguments import number, whole_number
from fxprune.removal.scores import Scores

from .base import allowed, amount
from .forward import ForwardImportancePass, refuse_group, rows_of
from .gram import Fitted, removal_order

__all__ = ["ReconstructionImportancePass"]

Grams = dict[tuple[fx.Node, int], torch.Tensor]
Work = tuple[Group, tuple[Consumer, ...]]


@dataclass(frozen=True, eq=False)
class ReconstructionImportancePass(ForwardImportancePass):
    """Units go one after the other, those first whose loss the others make up for best, until all are gone.

    A consumer gives ``X B`` with inputs ``X (tokens, in)`` and weight ``B (in, out)``. Let ``H = X' X + ridge`` and
    ``Hinv`` its inverse over the inputs that are left. As the inputs ``g`` of a unit go and the others are fitted, the
    squared error grows by::

        sum over o of B_go' inv(Hinv_gg) B_go

    the unit with the least goes, ``B -= Hinv[:, g] inv(Hinv_gg) B_g``, ``Hinv -= Hinv[:, g] inv(Hinv_gg) Hinv[g, :]``,
    and so on. The score of a unit is what it cost at its turn, or what the dearest before it cost. So the order of the
    scores is that of the turns, and serves any ratio. It is that squared error a token, so layers can be compared.

    It goes well with a compensation by ``least-squares``, which makes the same fit.

    Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
    Optimization" (arXiv 2403.12983), section 3; the update is that of Hassibi, Stork, "Second order derivatives for
    network pruning: Optimal Brain Surgeon" (NIPS 1992), equation 5, for blocks.

    Args:
        ridge: in units of the mean square of an input.
        steps: turns for a group; as many units go in each.
        memory: for ``X' X``: ``fast``, ``low``, ``auto`` or a fraction of the bytes of all weights, as in taylor. Less
            memory, more sweeps over the data.
    """

    name: ClassVar[str] = "reconstruction"

    ridge: float = 0.1
    steps: int = 64
    memory: float | str = "auto"

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        object.__setattr__(self, "ridge", number("ridge", self.ridge, above=0))
        object.__setattr__(self, "steps", whole_number("steps", self.steps, least=1))
        object.__setattr__(self, "memory", amount(self.memory))

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """What each unit costs at its turn.

        Raises:
            PassError: nothing adds up over the units of a group.
            CalibrationError: an input is not finite.
        """
        units: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
        for chunk in self._chunks(graph_module, groups):
            grams, tokens = self._grams(graph_module, chunk)
            for group, consumers in chunk:
                row = self._ordered(graph_module, group, consumers, grams) / max(tokens, 1)
                units[group.name] = row if group.outer is None else row.reshape(group.outer.size, group.size)
        return Scores(units)

    def _chunks(self, graph_module: fx.GraphModule, groups: Sequence[Group]) -> Iterator[list[Work]]:
        """Groups whose matrices fit into the memory allowed together."""
        consumers = find_consumers(graph_module.graph, facts_of(graph_module)[Dependencies].axes)
        works: list[tuple[Work, dict[tuple[fx.Node, int], int]]] = []
        for group in groups:
            own = consumers_of(group, consumers)
            if not own:
                raise refuse_group(group, self.name, "weight that adds up over its units")
            sizes = {(c.source, c.dim): 4 * get_tensor(graph_module, c.name).shape[c.axis] ** 2 for c in own}
            works.append(((group, own), sizes))
        budget = allowed(
            self.memory, graph_module, sum({k: v for _, sizes in works for k, v in sizes.items()}.values())
        )
        chunk: list[Work] = []
        used: dict[tuple[fx.Node, int], int] = {}
        for work, new in works:
            if chunk and sum((used | new).values()) > budget:
                yield chunk
                chunk, used = [], {}
            chunk.append(work)
            used |= new
        if chunk:
            yield chunk

    def _grams(self, graph_module: fx.GraphModule, chunk: list[Work]) -> tuple[Grams, int]:
        """``X' X`` of every input of the consumers, and the number of positions of the samples."""
        samples = self.calibration(graph_module)
        grams: Grams = {}
        dims: dict[fx.Node, set[int]] = {}
        for _, consumers in chunk:
            for consumer in consumers:
                dims.setdefault(consumer.source, set()).add(consumer.dim)

        def add(node: fx.Node, value: torch.Tensor) -> None:
            for dim in dims[node]:
                rows = rows_of(value, dim)
                square = rows.T @ rows
                grams[node, dim] = grams[node, dim].add_(square) if (node, dim) in grams else square

        observe(graph_module, samples, {node: partial(add, node) for node in dims}, self.batch, self.tracked)
        return grams, sum(sample.labels.numel() for sample in samples)

    def _ordered(
        self, graph_module: fx.GraphModule, group: Group, consumers: tuple[Consumer, ...], grams: Grams
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        axes = facts_of(graph_module)[Dependencies].axes
        count = group.size * (1 if group.outer is None else group.outer.size)
        products = []
        for consumer in consumers:
            square = grams[consumer.source, consumer.dim]
            if not bool(square.isfinite().all()):
                raise CalibrationError(
                    "its inputs are not finite", where=consumer.name, remedy="Check the weights and the samples"
                )
            weight = get_tensor(graph_module, consumer.name).detach().movedim(consumer.axis, 0).flatten(1)
            products.append(Fitted.of(square, weight, units_at(group, consumer, axes), count, self.ridge))
        return removal_order(products, self.steps)
