"""Least squares: a weight that lost inputs is fitted anew, so that it gives what the dense one gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import CalibrationError
from fxprune.graph.tensors import get_tensor
from fxprune.masking.side_by_side import SideBySide
from fxprune.pipeline.arguments import flag, number

from .base import FitPass, pairs
from .moments import Damping, Stack, best_damping
from .sites import Site

__all__ = ["LeastSquaresPass"]


@dataclass(frozen=True, eq=False)
class LeastSquaresPass(FitPass):
    """What stays of each weight that loses inputs gives, as nearly as it can, what the whole weight gave.

    The dense graph and the one with the plan's structures masked run side by side over the calibration data. At each
    product with a weight ``(out, in)`` that loses inputs, let ``w`` be its kept columns, ``X (kept, tokens)`` the kept
    inputs in the masked graph and ``Y (out, tokens)`` what the product gives in the dense one. The new columns are::

        w + (Y - w X) X' (X X' + d * R) ^ -1      R = mean(diag(X X')) * I, or with ``each`` diag(X X')

    Weights before it are fitted already, so it makes up for what they could not. Where the product is added to another
    value, as in a residual stream, ``Y`` is what the *sum* lacks, and errors do not pile up from block to block. A bias
    that the product adds moves with it, as the weight of one more input that is always 1 and is not held back: it
    takes up the mean of what went.

    Of matrices that lie side by side in one weight, as those of experts do, each is fitted to what the same matrix
    gives in the dense graph, its *own* output and not what a sum lacks, on the tokens that reach it in both graphs. All
    share one ``d``, and ``R`` is what a matrix has on average: the fewer tokens reach one, the more its old columns
    count, and where none does it stays. Biases of experts stay. In a convolution each channel at each tap is an input.

    Weights that are used more than once, or that no plain product reads, stay as they are: those of convolutions in
    groups, and of experts whose tokens are sorted into runs of a length that depends on the data. Names and shapes stay
    the same.

    Source: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168), sections
    3.1 (equation 1 for given channels) and 3.3 (residual branches); the bias after An et al., "Fluctuation-based
    Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983), section 3.3.

    Args:
        damping: ``d``: how much the old columns count; above 0. None for what does best, weight by weight, on a
            quarter of the tokens that the fit on the others has not seen, of 0.03 to 30 and of both kinds of ``R``;
            where none does better than no change, the weight stays.
        each: with a damping given, hold each input back by its own mean square and not by that of all inputs. Where
            few inputs are far larger than the others, one number for all holds the others fast.
        bias: whether biases move.
    """

    name: ClassVar[str] = "least-squares"

    damping: float | None = None
    each: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ArgumentError: the damping is not above 0, or the batch below 1.
        """
        super().__post_init__()
        if self.damping is not None:
            object.__setattr__(self, "damping", number("damping", self.damping, above=0))
        for name in ("each", "bias"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))

    def fitted(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return the weight, and the bias where there is one, that give what is wanted as nearly as they can."""
        W = site.matrices(graph_module)
        w = W[..., site.kept]
        added = site.bias if self.bias else None
        front, back = Stack.of(w, added is not None), Stack.of(w, added is not None)
        for matrix, X, y in pairs(site, run):
            D = y - X @ w[matrix].T
            parts = max(1, len(X) * 3 // 4)
            front.of_each[matrix].add(X[:parts], D[:parts])
            back.of_each[matrix].add(X[parts:], D[parts:])
        front, back = front.over_all(), back.over_all()
        if not (front.finite() and back.finite()):
            raise CalibrationError(
                "its inputs or outputs are too large", where=site.name, remedy="Check the weights and the samples"
            )
        damping = best_damping(front, back) if self.damping is None else Damping(self.damping, self.each)
        front.take(back)
        del back
        change = front.solve(damping).mT.to(w.dtype)
        found = {site.weight: site.weight_of(W.index_copy(2, site.kept, w + change[..., : w.shape[2]]))}
        if added is not None:
            old = get_tensor(graph_module, str(added.target)).detach().to(change.device)
            found[added] = (old.to(change.dtype) + change[0, :, -1]).to(old.dtype)
        return found
