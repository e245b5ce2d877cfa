"""Backward selection: remove first the units that a fit of the others compensates best.

The score of a unit is what its consumers lose that a fit of the units that stay cannot give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.axes import Index
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Consumer, Group, units_at
from fxprune.errors import CalibrationError
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import get_tensor
from fxprune.offload.ranks import all_reduce, deal, gathered
from fxprune.pipeline.arguments import Memory, argument
from fxprune.removal.removal import Array, Scores

from .base import memory_limit, require_finite, usable_bytes
from .forward import ForwardImportancePass, Place

Grams = dict[Place, torch.Tensor]
Work = tuple[Group, tuple[Consumer, ...]]


@dataclass
class FittedProduct:
    """A product ``X B`` whose inputs are removed one after the other, the rest being fitted each time.

    Args:
        inverse: of ``X' X`` plus the ridge, over all inputs: ``(in, in)``.
        weight: ``B (in, out)``; the fit of the inputs that are left.
        unit: the unit that each input belongs to, -1 for none: ``(in,)``.
        count: number of units.
    """

    inverse: torch.Tensor
    weight: torch.Tensor
    unit: Index
    count: int

    @classmethod
    def of(cls, square: torch.Tensor, weight: torch.Tensor, unit: Index, count: int, ridge: float) -> FittedProduct:
        """From ``X' X``, with a ridge in units of its mean diagonal."""
        damped = square.double().clone()
        # the tiny number keeps inputs that are all zero from making the matrix singular
        damped.diagonal().add_(ridge * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed.any():
            what = f"ridge={ridge:g} is too small for inputs that depend on each other"
            raise CalibrationError(what, where="reconstruction", remedy="Give a larger ridge, or more samples")
        return cls(torch.cholesky_inverse(factor), weight.double().clone(), unit, count)

    def costs(self) -> torch.Tensor:
        """The increase of the squared error of the fit by removing each unit: ``(units,)``."""
        found = self.weight.new_zeros(self.count)
        places = np.flatnonzero(self.unit >= 0)
        order = places[np.argsort(self.unit[places], kind="stable")]
        units, sizes = np.unique(self.unit[order], return_counts=True)
        for size in np.unique(sizes):
            # units of one size at once: blocks of the inverse, one for each
            mine = units[sizes == size]
            begins = np.concatenate(([0], np.cumsum(sizes)))[:-1][sizes == size]
            index = torch.from_numpy(order[begins[:, None] + np.arange(size)]).to(self.weight.device)
            blocks = self.inverse[index[:, :, None], index[:, None, :]]
            rows = self.weight[index]
            solved = rows / blocks if size == 1 else _solve(blocks, rows)
            found[torch.from_numpy(mine).to(found.device)] = (rows * solved).sum((1, 2))
        return found

    def remove(self, units: Index) -> None:
        gone = torch.from_numpy(np.flatnonzero(np.isin(self.unit, units))).to(self.weight.device)
        columns = self.inverse[:, gone]
        solved = _solve(self.inverse[gone][:, gone], torch.cat((columns.T, self.weight[gone]), 1))
        width = len(self.inverse)
        self.inverse -= columns @ solved[:, :width]
        self.weight -= columns @ solved[:, width:]
        self.unit = np.where(np.isin(self.unit, units), -1, self.unit)


def _solve(blocks: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``inv(blocks) @ right`` for positive definite blocks.

    Not by ``torch.linalg.solve``: with two threads, its batched factors of blocks of 192 come out wrong, or never, from
    the MKL in torch 2.13 for CPUs without AVX-512.
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(blocks))


def removal_costs(products: Sequence[FittedProduct], steps: int) -> Array:
    """Costs ``(units,)`` in the order of removal, made increasing.

    Each turn removes the same number of units, at least one: those with the lowest cost, summed over all products.
    """

    def take(left: Index, each: int) -> tuple[Index, Array]:
        found = torch.stack([product.costs() for product in products]).sum(0).cpu().numpy()[left]
        picked = np.argsort(found, kind="stable")[:each]
        if len(picked) < len(left):
            for product in products:
                product.remove(left[picked])
        return left[picked], found[picked]

    return costs_in_turn(products[0].count, steps, take)


def costs_in_turn(
    count: int, steps: int, take: Callable[[Index, int], tuple[Index, Array]], floor: float = 0.0
) -> Array:
    """Costs ``(units,)`` of units removed in turns, the same number in each, made increasing from ``floor`` on.

    ``take`` is given the units left and how many to remove, and returns those it removed, in order, and their costs.
    """
    left: Index = np.arange(count)
    turns: list[tuple[Index, Array]] = [(np.zeros(0, dtype=np.int64), np.zeros(0))]
    while len(left):
        turns.append(take(left, max(1, -(-count // steps))))
        left = np.setdiff1d(left, turns[-1][0], assume_unique=True)
    order, costs = (np.concatenate(parts) for parts in zip(*turns, strict=True))
    scores = np.zeros(count)
    scores[order] = increasing_costs(costs, floor)
    return scores


def increasing_costs(costs: Array, floor: float = 0.0) -> Array:
    """Costs in the order of removal, made increasing from ``floor`` on, so that sorting by them gives that order."""
    largest = np.maximum.accumulate(np.maximum(costs, floor))
    # a millionth more from first to last breaks ties
    return np.asarray(largest * (1 + 1e-6 * np.arange(len(costs)) / max(len(costs), 1)))


@dataclass(frozen=True, eq=False)
class ReconstructionImportancePass(ForwardImportancePass):
    """Scores units by removing them one after the other, first those whose loss the others compensate best.

    A consumer gives ``X B`` with inputs ``X (tokens, in)`` and weight ``B (in, out)``. Let ``H = X' X + ridge`` and
    ``Hinv`` its inverse over the inputs that are left. When the inputs ``g`` of a unit are removed and the others are
    fitted, the squared error grows by::

        sum over o of B_go' inv(Hinv_gg) B_go

    the unit with the lowest cost goes, ``B -= Hinv[:, g] inv(Hinv_gg) B_g``, ``Hinv -= Hinv[:, g] inv(Hinv_gg) Hinv[g,
    :]``, and so on. The score of a unit is its cost at its turn, or the largest cost before it. So the order of the
    scores is that of the turns, and serves any ratio. It is the squared error per token, so layers can be compared.

    It goes well with a compensation by ``least-squares``, which makes the same fit.

    Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
    Optimization" (arXiv 2403.12983), section 3; the update is that of Hassibi, Stork, "Second order derivatives for
    network pruning: Optimal Brain Surgeon" (NIPS 1992), equation 5, for blocks.
    """

    name: ClassVar[str] = "reconstruction"

    ridge: float = argument(0.1, "Ridge of the fits, in units of the mean square of an input.", above=0)
    steps: int = argument(64, "Steps for each group; the same number of units is removed in each.", least=1)
    memory: float | Memory = argument(
        "auto",
        """Memory for ``X' X``: ``fast``, ``low``, ``auto`` or a fraction of the bytes of all weights, as in taylor.
        Less memory takes more sweeps over the data.""",
        check=memory_limit,
    )

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        units: dict[str, Array] = {}
        groups = tuple(group.tied() for group in groups)
        axes = facts_of(graph_module)[Dependencies].axes
        tokens = sum(sample.labels.numel() for sample in self.calibration(graph_module))
        for chunk in self._chunks(graph_module, groups):
            grams = self._grams(graph_module, chunk)
            rows = []
            for group, consumers in deal(chunk):
                products = []
                for one in consumers:
                    weight = get_tensor(graph_module, one.name).detach().movedim(one.axis, 0).flatten(1)
                    unit, square = units_at(group, one, axes), grams[one.source, one.dim]
                    products.append(FittedProduct.of(square, weight, unit, prod(group.shape), self.ridge))
                rows.append(removal_costs(products, self.steps) / max(tokens, 1))
            for (group, _), row in zip(chunk, gathered(rows), strict=True):
                units[group.name] = row.reshape(group.shape)
        return Scores(units)

    def _chunks(self, graph_module: fx.GraphModule, groups: Sequence[Group]) -> Iterator[list[Work]]:
        """Groups whose matrices ``X' X`` fit into memory together."""
        works: list[tuple[Work, dict[Place, int]]] = []
        for group, consumers in self.consumers(graph_module, groups):
            sizes = {(c.source, c.dim): 4 * get_tensor(graph_module, c.name).shape[c.axis] ** 2 for c in consumers}
            works.append(((group, consumers), sizes))
        needed = sum({k: v for _, sizes in works for k, v in sizes.items()}.values())
        limit = usable_bytes(self.memory, graph_module, needed)
        chunk: list[Work] = []
        used: dict[Place, int] = {}
        for work, new in works:
            if chunk and sum((used | new).values()) > limit:
                yield chunk
                chunk, used = [], {}
            chunk.append(work)
            used |= new
        if chunk:
            yield chunk

    def _grams(self, graph_module: fx.GraphModule, chunk: list[Work]) -> Grams:
        """``X' X`` of every input of the consumers."""
        grams: Grams = {}
        consumers = [one for _, found in chunk for one in found]

        def add(place: Place, rows: torch.Tensor) -> None:
            square = rows.T @ rows
            grams[place] = grams[place].add_(square) if place in grams else square

        self.observe_inputs(graph_module, consumers, add)
        all_reduce(grams.values())
        for consumer in consumers:
            require_finite(grams[consumer.source, consumer.dim], consumer.name)
        return grams
