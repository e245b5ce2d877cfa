"""Backward selection of the inputs of products, each removal made up for by what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Fitted", "growing", "removal_order"]

Units = np.ndarray[tuple[int], np.dtype[np.int64]]
Costs = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass
class Fitted:
    """A product ``X B`` whose inputs go one after the other, what is left being fitted each time.

    Args:
        inverse: of ``X' X`` plus the ridge, over all inputs: ``(in, in)``.
        weight: ``B (in, out)``; the fit of what is left.
        unit: which unit each input belongs to, -1 where to none: ``(in,)``.
        count: number of units.
    """

    inverse: torch.Tensor
    weight: torch.Tensor
    unit: Units
    count: int

    @classmethod
    def of(cls, square: torch.Tensor, weight: torch.Tensor, unit: Units, count: int, ridge: float) -> Fitted:
        """Of ``X' X``, with a ridge in units of its mean diagonal."""
        damped = square.double().clone()
        # the tiny number keeps inputs that are all zero from making the matrix singular
        damped.diagonal().add_(ridge * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
        return cls(torch.cholesky_inverse(torch.linalg.cholesky(damped)), weight.double().clone(), unit, count)

    def costs(self) -> torch.Tensor:
        """Return by how much the squared error of the fit grows as each unit goes: ``(units,)``."""
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
            solved = rows / blocks if size == 1 else _solved(blocks, rows)
            found[torch.from_numpy(mine).to(found.device)] = (rows * solved).sum((1, 2))
        return found

    def remove(self, units: Units) -> None:
        """Take units out; what is left is fitted."""
        gone = torch.from_numpy(np.flatnonzero(np.isin(self.unit, units))).to(self.weight.device)
        columns = self.inverse[:, gone]
        solved = _solved(self.inverse[gone][:, gone], torch.cat((columns.T, self.weight[gone]), 1))
        width = len(self.inverse)
        self.inverse -= columns @ solved[:, :width]
        self.weight -= columns @ solved[:, width:]
        self.unit = np.where(np.isin(self.unit, units), -1, self.unit)


def _solved(blocks: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``inv(blocks) @ right`` for positive definite blocks.

    Not by ``torch.linalg.solve``: with two threads, its batched factors of blocks of 192 come out wrong, or never, from
    the MKL in torch 2.13 for CPUs without AVX-512.
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(blocks))


def removal_order(products: list[Fitted], steps: int) -> Costs:
    """Return what each unit costs at its turn, never less than one that went before: ``(units,)``.

    In each turn those go that cost least then, in all products together.

    Args:
        products: what adds up over the units.
        steps: turns; as many units go in each, one at least.
    """
    left, order, costs = np.arange(products[0].count), [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    each = max(1, -(-len(left) // steps))
    while len(left):
        found = torch.stack([product.costs() for product in products]).sum(0).cpu().numpy()[left]
        picked = np.argsort(found, kind="stable")[:each]
        order.append(left[picked])
        costs.append(found[picked])
        if len(picked) < len(left):
            for product in products:
                product.remove(left[picked])
        left = np.delete(left, picked)
    scores = np.zeros(products[0].count)
    scores[np.concatenate(order)] = growing(np.concatenate(costs))
    return scores


def growing(costs: Costs, floor: float = 0.0) -> Costs:
    """Return what things cost in the order in which they go, never less than one before: that order sorts them.

    Args:
        costs: in that order.
        floor: the least that one costs.
    """
    dearest = np.maximum.accumulate(np.maximum(costs, floor))
    # a millionth more from first to last tells those apart that cost the same
    return np.asarray(dearest * (1 + 1e-6 * np.arange(len(costs)) / max(len(costs), 1)))
