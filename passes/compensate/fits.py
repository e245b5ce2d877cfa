"""Fits of weights that lost inputs: least squares, and rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import CalibrationError
from fxprune.graph.tensors import get_tensor
from fxprune.masking.compare import PairedRuns
from fxprune.offload.files import offloaded, write_back
from fxprune.offload.ranks import all_reduce, broadcast_dealt, deal, gathered
from fxprune.pipeline.arguments import argument

from .base import FitPass, FitSite, fit_data

_LADDER = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_FIRST = 3
"""Where the search on the ladder begins; most weights do best near 1."""


@dataclass(frozen=True)
class Damping:
    """The ridge of a fit, which pulls towards the old weights.

    Args:
        strength: how much the old weights count; infinite for no change.
        each: in units of the mean square of each input; else of that of all inputs.
    """

    strength: float
    each: bool = False


@dataclass(frozen=True)
class FitMoments:
    """Sufficient statistics of a fit: tokens with inputs ``X (tokens, in)`` and missing outputs ``D (tokens, out)``.

    Args:
        square: ``X' X``.
        product: ``X' D``.
        free: whether the last input is a constant, to which no damping applies.
    """

    square: torch.Tensor
    product: torch.Tensor
    free: bool = False

    @classmethod
    def empty(cls, weight: torch.Tensor, free: bool = False) -> FitMoments:
        """Zeros for a weight ``(out, in)``, with a constant beside its inputs if ``free``."""
        rows, columns = weight.shape
        columns += free
        square, product = (weight.new_zeros(columns, size, dtype=torch.float64) for size in (columns, rows))
        return cls(square, product, free)

    def add(self, X: torch.Tensor, D: torch.Tensor) -> None:
        X = torch.cat((X, X.new_ones(len(X), 1)), dim=1) if self.free else X
        X = X.double()  # of products in float32 the rounding depends on the batches, and a fit may amplify it
        self.square.addmm_(X.T, X)
        self.product.addmm_(X.T, D.double())

    def merge(self, other: FitMoments) -> None:
        self.square.add_(other.square)
        self.product.add_(other.product)

    def solve(self, damping: Damping, scale: torch.Tensor | None = None) -> torch.Tensor:
        """The change of the weight, transposed: ``(in, out)``; zero if the damping is infinite.

        Damping is in units of ``scale (in,)``; None for the squares of these tokens.
        """
        if damping.strength == float("inf"):
            return torch.zeros_like(self.product)
        squares = self.square.diagonal().clone() if scale is None else scale
        inputs = squares[: len(squares) - self.free]
        ridge = squares.clone() if damping.each else torch.full_like(squares, float(inputs.mean()))
        if self.free:
            ridge[-1] = 0
        # added in place: a copy of the matrix would be the largest thing in memory
        diagonal = self.square.diagonal()
        before = diagonal.clone()
        try:
            # the tiny number keeps inputs that are all zero from making the matrix singular
            diagonal.add_(damping.strength * ridge + torch.finfo(torch.float32).tiny)
            factor, failed = torch.linalg.cholesky_ex(self.square)
        finally:
            diagonal.copy_(before)
        if failed.any():
            what = f"damping={damping.strength:g} is too small for inputs that depend on each other"
            raise CalibrationError(what, where="least-squares", remedy="Give a larger damping, or more samples")
        return torch.cholesky_solve(self.product, factor)

    def error(self, change: torch.Tensor) -> float:
        """The squared error on these tokens after a change of the weight, minus the error without it."""
        return float(((self.square @ change - 2 * self.product) * change).sum())

    def error_on(self, other: FitMoments, damping: Damping) -> float:
        """The error on the tokens of ``other`` after the change that fits these tokens."""
        return other.error(self.solve(damping))


@dataclass(frozen=True)
class StackedMoments:
    """The moments of several matrices of a weight, each with tokens of its own.

    The ridge of all is in units of their average, so that a matrix with few tokens stays nearer to its old values, and
    one with none keeps them.
    """

    of_each: tuple[FitMoments, ...]

    @classmethod
    def empty(cls, weights: torch.Tensor, free: bool = False) -> StackedMoments:
        """Zeros for weights ``(matrices, out, in)``, with a constant beside their inputs if ``free``.

        They are in files if the weights are: of many matrices they take several times the bytes of these.
        """
        matrices, rows, columns = weights.shape
        sizes = ((matrices, columns + free, size) for size in (columns + free, rows))
        squares, products = (offloaded(weights.new_zeros(size, dtype=torch.float64)) for size in sizes)
        pairs = zip(squares.unbind(), products.unbind(), strict=True)
        return cls(tuple(FitMoments(square, product, free) for square, product in pairs))

    def all_reduce(self) -> None:
        all_reduce(tensor for moments in self.of_each for tensor in (moments.square, moments.product))

    def merge(self, other: StackedMoments) -> None:
        for mine, others in zip(self.of_each, other.of_each, strict=True):
            mine.merge(others)

    def is_finite(self) -> bool:
        return all(bool(m.square.isfinite().all() and m.product.isfinite().all()) for m in self.of_each)

    def solve(self, damping: Damping, dtype: torch.dtype) -> torch.Tensor:
        """The changes of the weights, each transposed: ``(matrices, in, out)``; of those of other processes, zeros."""
        found = torch.zeros(len(self.of_each), *self.of_each[0].product.shape, dtype=dtype, device=self._device)
        for i, change in self._changes(damping):
            found[i] = change
        return found

    def error_on(self, other: StackedMoments, damping: Damping) -> float:
        """The sum of the errors on the tokens of ``other``, of each matrix from the process that has its change."""
        return sum(gathered([other.of_each[i].error(change) for i, change in self._changes(damping)]))

    @property
    def _device(self) -> torch.device:
        return self.of_each[0].product.device

    def _changes(self, damping: Damping) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield this process's matrices by number, each with its change: of all at once they take much memory."""
        squares = torch.stack([moments.square.diagonal() for moments in self.of_each])
        reached = squares.any(dim=1)
        scale = squares.sum(dim=0) / reached.sum().clamp(min=1)
        for i in deal(range(len(self.of_each))):
            yield i, self.of_each[i].solve(damping, scale)


def best_damping(front: FitMoments | StackedMoments, back: FitMoments | StackedMoments) -> Damping:
    """The damping with which a fit on ``front`` does best on ``back``; infinite if none does better than no change.

    The strengths of each kind are tried from the middle of the ladder, in the direction that improves. Processes share
    the matrices, or the kinds if there is one matrix.
    """
    kinds = (False, True)
    if isinstance(front, StackedMoments) and isinstance(back, StackedMoments) and len(front.of_each) == 1:
        one, other = front.of_each[0], back.of_each[0]
        climbs = gathered([list(_climb(one, other, each)) for each in deal(kinds)])
    else:
        climbs = [list(_climb(front, back, each)) for each in kinds]
    return min([(0.0, Damping(float("inf"))), *itertools.chain(*climbs)], key=lambda pair: pair[0])[1]


def _climb(
    front: FitMoments | StackedMoments, back: FitMoments | StackedMoments, each: bool
) -> Iterator[tuple[float, Damping]]:
    def error(place: int) -> float:
        return front.error_on(back, Damping(_LADDER[place], each))  # type: ignore[arg-type]

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
    """Fits the kept columns of each weight that lost inputs to the outputs of the whole weight.

    The dense graph and the one with the plan's structures masked run side by side over the calibration data. At each
    product with a weight ``(out, in)`` that loses inputs, let ``w`` be its kept columns, ``X (kept, tokens)`` the kept
    inputs in the masked graph and ``Y (out, tokens)`` the output of the product in the dense one. The new columns are::

        w + (Y - w X) X' (X X' + d * R) ^ -1      R = mean(diag(X X')) * I, or with ``each`` diag(X X')

    The weights before it are fitted already, so it compensates for their remaining error. If the product is added to
    another value, as in a residual stream, ``Y`` is what the *sum* lacks, and errors do not accumulate from block to
    block. A bias that the product adds moves with it, as the weight of one more input that is always 1 and has no
    ridge: it takes up the mean of what was removed.

    Of the matrices of one weight, as those of experts, each is fitted to the output of the same matrix in the dense
    graph, its *own* output and not what a sum lacks, on the tokens that reach it in both graphs. All share one ``d``,
    and ``R`` is their average: the fewer tokens reach a matrix, the more its old columns count, and with none it keeps
    them. Biases of experts stay. In a convolution each channel at each tap is an input.

    Weights that are used more than once, or that no plain product reads, stay as they are: those of convolutions in
    groups, and of experts whose tokens are sorted into runs of a length that depends on the data. Names and shapes stay
    the same.

    Source: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168), sections
    3.1 (equation 1 for given channels) and 3.3 (residual branches); the bias after An et al., "Fluctuation-based
    Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983), section 3.3.
    """

    name: ClassVar[str] = "least-squares"
    reads_targets_alone: ClassVar[bool] = True

    damping: float | None = argument(
        None,
        """Strength of the ridge towards the old columns: ``d``. None to choose for each weight what does best, of 0.03
        to 30 and of both kinds of ``R``, on a held-out quarter of the tokens; if none does better than no change, the
        weight stays.""",
        above=0,
    )
    each: bool = argument(
        False,
        """With a given damping, measure the ridge of each input in units of its own mean square, not of that of all
        inputs. If a few inputs are far larger than the others, one number for all keeps the others from moving.""",
    )
    bias: bool = argument(True, "Whether biases are fitted too.")

    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        W = site.matrices(graph_module, run)
        w = W[..., site.kept]
        added = site.bias if self.bias else None
        front, back = (StackedMoments.empty(w, added is not None) for _ in range(2))
        for matrix, X, y, held in fit_data(site, run):
            D = y - X @ w[matrix].T
            for moments, rows in ((front.of_each[matrix], ~held), (back.of_each[matrix], held)):
                moments.add(X[rows], D[rows])
                if len(W) > 1:  # of many matrices they are several times what memory may hold
                    write_back(moments.square)
                    write_back(moments.product)
        front.all_reduce()
        back.all_reduce()
        if not (front.is_finite() and back.is_finite()):
            remedy = "Check the weights and the samples"
            raise CalibrationError("its inputs or outputs are too large", where=site.name, remedy=remedy)
        damping = best_damping(front, back) if self.damping is None else Damping(self.damping, self.each)
        front.merge(back)
        del back
        change = front.solve(damping, w.dtype).mT
        broadcast_dealt(change)
        found = {site.weight: site.weight_of(W.index_copy(2, site.kept, w + change[..., : w.shape[2]]))}
        if added is not None:
            old = get_tensor(graph_module, str(added.target)).detach().to(change.device)
            found[added] = (old.to(change.dtype) + change[0, :, -1]).to(old.dtype)
        return found


@dataclass(frozen=True, eq=False)
class RotationPass(FitPass):
    """Rotates the outputs of each weight that lost inputs, all by one rotation, towards the dense ones.

    With ``w`` the kept columns of a weight ``(out, in)``, ``Z = w X (out, tokens)`` their outputs in the masked graph
    and ``Y (out, tokens)`` the targets, the new columns are ``Q w`` for the orthogonal ``Q`` that minimises
    ``|Y - Q Z|^2 + d |Q - 1|^2``, which is ``U V'`` of the singular value decomposition of ``Y Z' + d``. No norm of a
    column changes, so it cannot overfit as much as a free fit, and needs fewer samples.

    As with ``least-squares``, ``Y`` is what the sum lacks if the product is added to another value; biases stay. Each
    matrix of a weight, as those of experts, has a rotation of its own, from the tokens that reach it.

    Source: "Rotation-Constrained Error Update" (RCPU), the orthogonal Procrustes problem; Schönemann, "A generalized
    solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """

    name: ClassVar[str] = "rotation"
    reads_targets_alone: ClassVar[bool] = True

    damping: float = argument(
        0.1,
        """Strength of the pull towards the old weight: ``d``, in units of the mean square of an output. It keeps
        directions that occur in no sample from being rotated.""",
        above=0,
    )

    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        W = site.matrices(graph_module, run)
        w = W[..., site.kept]
        both = W.new_zeros(len(W), W.shape[1], W.shape[1], dtype=torch.float64)
        scale = both.new_zeros(len(W))
        for matrix, X, y, _ in fit_data(site, run):
            Z = X @ w[matrix].T
            both[matrix] += y.double().T @ Z.double()
            scale[matrix] += Z.square().sum() / W.shape[1]
        all_reduce((both, scale))
        mean = float(scale.sum()) / max(1, int(scale.count_nonzero()))
        rotated = w.clone()
        for matrix in deal(range(len(W))):
            if not scale[matrix]:
                continue
            both[matrix].diagonal().add_(self.damping * mean)
            left, _, right = torch.linalg.svd(both[matrix])
            rotated[matrix] = (left @ right).to(w.dtype) @ w[matrix]
        broadcast_dealt(rotated)
        return {site.weight: site.weight_of(W.index_copy(2, site.kept, rotated))}
