"""What a fit needs to know of tokens, and the fit itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fxprune.data.ranks import add_up

__all__ = ["Damping", "Moments", "Stack", "best_damping"]

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
class Moments:
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
    def of(cls, weight: torch.Tensor, free: bool = False) -> Moments:
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

    def over_all(self) -> Moments:
        """Of the tokens of all processes, where several share the samples."""
        add_up((self.square, self.product))
        return self

    def take(self, other: Moments) -> None:
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

    of_each: tuple[Moments, ...]

    @classmethod
    def of(cls, weights: torch.Tensor, free: bool = False) -> Stack:
        """Of no tokens yet, for weights ``(matrices, out, in)``, and a constant beside their inputs where ``free``."""
        return cls(tuple(Moments.of(weight, free) for weight in weights))

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


def best_damping(front: Moments | Stack, back: Moments | Stack) -> Damping:
    """Return the damping with which a fit on ``front`` does best on ``back``; infinite where none does better than 0.

    Of each kind the strengths are tried from the middle of the ladder on, in the direction that gets better.
    """
    tried = [(0.0, Damping(float("inf")))]
    for each in (False, True):
        tried.extend(_climb(front, back, each))
    return min(tried, key=lambda pair: pair[0])[1]


def _climb(front: Moments | Stack, back: Moments | Stack, each: bool) -> Iterator[tuple[float, Damping]]:
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
