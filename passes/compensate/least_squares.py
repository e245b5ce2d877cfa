"""Least squares: weights that lost inputs are fitted to the dense outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import CalibrationError
from fxprune.graph.tensors import get_tensor
from fxprune.masking.compare import SideBySide
from fxprune.offload.ranks import add_up
from fxprune.pipeline.arguments import flag, number

from .base import FitPass, Site, pairs

__all__ = ["Damping", "FitMoments", "LeastSquaresPass", "Stack", "best_damping"]

_LADDER = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_FIRST = 3
"""Where the search on the ladder begins; most weights do best near 1."""


@dataclass(frozen=True)
class Damping:
    """How much a fit is held back.

    Args:
        strength: how much the old weights count; infinite for no change.
        each: in units of the mean square of each input; else of that of all inputs.
    """

    strength: float
    each: bool = False


@dataclass(frozen=True)
class FitMoments:
    """What a fit needs to know of tokens ``X (tokens, in)`` and what they lack ``D (tokens, out)``.

    Args:
        square: ``X' X``.
        product: ``X' D``.
        free: whether the last input is a constant, which is not held back.
    """

    square: torch.Tensor
    product: torch.Tensor
    free: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor, free: bool = False) -> FitMoments:
        """Of no tokens yet, for a weight ``(out, in)``, and a constant beside its inputs where ``free``."""
        rows, columns = weight.shape
        columns += free
        square, product = (weight.new_zeros(columns, size, dtype=torch.float64) for size in (columns, rows))
        return cls(square, product, free)

    def add(self, X: torch.Tensor, D: torch.Tensor) -> None:
        """Take in more tokens."""
        X = torch.cat((X, X.new_ones(len(X), 1)), dim=1) if self.free else X
        self.square.add_(X.T @ X)
        self.product.add_(X.T @ D)

    def over_all(self) -> FitMoments:
        """Of the tokens of all processes, where several share the samples."""
        add_up((self.square, self.product))
        return self

    def take(self, other: FitMoments) -> None:
        """Take in the tokens of another."""
        self.square.add_(other.square)
        self.product.add_(other.product)

    def finite(self) -> bool:
        """Whether every number is one."""
        return bool(self.square.isfinite().all() and self.product.isfinite().all())

    def solve(self, damping: Damping, scale: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the weight, transposed: ``(in, out)``; none where the damping is infinite.

        Args:
            damping: how much it is held back.
            scale: the squares ``(in,)`` that the damping is in units of; None for those of these tokens.
        """
        if damping.strength == float("inf"):
            return torch.zeros_like(self.product)
        own = self.square.diagonal().clone() if scale is None else scale
        inputs = own[: len(own) - self.free]
        ridge = own.clone() if damping.each else torch.full_like(own, float(inputs.mean()))
        if self.free:
            ridge[-1] = 0
        with self._damped(damping.strength * ridge):
            factor = torch.linalg.cholesky(self.square)
        return torch.cholesky_solve(self.product, factor)

    @contextmanager
    def _damped(self, ridge: torch.Tensor) -> Iterator[None]:
        """Add to the diagonal for a while: a copy of the matrix would be the largest thing in memory."""
        diagonal = self.square.diagonal()
        before = diagonal.clone()
        # the tiny number keeps inputs that are all zero from making the matrix singular
        diagonal.add_(ridge + torch.finfo(torch.float32).tiny)
        try:
            yield
        finally:
            diagonal.copy_(before)

    def error(self, change: torch.Tensor) -> float:
        """The squared error on these tokens after a change of the weight, less the error without it."""
        return float(((self.square @ change - 2 * self.product) * change).sum())


@dataclass(frozen=True)
class Stack:
    """The moments of matrices side by side, each with tokens of its own.

    All are held back by what a matrix has on average, so that one with few tokens stays nearer to what it was, and one
    with none as it was.

    Args:
        of_each: of each matrix.
    """

    of_each: tuple[FitMoments, ...]

    @classmethod
    def of(cls, weights: torch.Tensor, free: bool = False) -> Stack:
        """Of no tokens yet, for weights ``(matrices, out, in)``, and a constant beside their inputs where ``free``."""
        return cls(tuple(FitMoments.of(weight, free) for weight in weights))

    def over_all(self) -> Stack:
        """Of the tokens of all processes, where several share the samples."""
        return Stack(tuple(moments.over_all() for moments in self.of_each))

    def take(self, other: Stack) -> None:
        """Take in the tokens of another."""
        for mine, others in zip(self.of_each, other.of_each, strict=True):
            mine.take(others)

    def finite(self) -> bool:
        """Whether every number is one."""
        return all(moments.finite() for moments in self.of_each)

    def solve(self, damping: Damping) -> torch.Tensor:
        """The changes of the weights, each transposed: ``(matrices, in, out)``."""
        squares = torch.stack([moments.square.diagonal() for moments in self.of_each])
        reached = squares.any(dim=1)
        scale = squares.sum(dim=0) / reached.sum().clamp(min=1)
        return torch.stack([moments.solve(damping, scale) for moments in self.of_each])

    def error(self, change: torch.Tensor) -> float:
        """The squared error on these tokens after a change of the weights, less the error without it."""
        return sum(moments.error(part) for moments, part in zip(self.of_each, change, strict=True))


def best_damping(front: FitMoments | Stack, back: FitMoments | Stack) -> Damping:
    """Return the damping with which a fit on ``front`` does best on ``back``; infinite where none does better than 0.

    Of each kind the strengths are tried from the middle of the ladder on, in the direction that gets better.
    """
    tried = [(0.0, Damping(float("inf")))]
    for each in (False, True):
        tried.extend(_climb(front, back, each))
    return min(tried, key=lambda pair: pair[0])[1]


def _climb(front: FitMoments | Stack, back: FitMoments | Stack, each: bool) -> Iterator[tuple[float, Damping]]:
    def error(place: int) -> float:
        return back.error(front.solve(Damping(_LADDER[place], each)))

    best = error(_FIRST)
    yield best, Damping(_LADDER[_FIRST], each)
    for step in (1, -1):
        place, least = _FIRST + step, best
        while 0 <= place < len(_LADDER) and (found := error(place)) < least:
            yield found, Damping(_LADDER[place], each)
            place, least = place + step, found
        if least < best:
            return


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
