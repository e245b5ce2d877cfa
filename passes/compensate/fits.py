"""Compensation: weights fitted to the dense model by least squares or rotation, one at a time.

Dense and masked graph run side by side, node by node.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.axes import kept_positions, weight_mask
from fxprune.data.calibration import Calibration, Sample, batch_indices, batched, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, Source, add_note, facts_of
from fxprune.graph.tensors import device_of, get_tensor, put, require_weights, take
from fxprune.masking.compare import PairedRuns
from fxprune.offload.files import (
    cached_tensors,
    offloaded,
    release_freed,
    write_back,
    write_cached_tensors,
    write_values,
)
from fxprune.offload.prefetch import compute_device, to_device
from fxprune.offload.ranks import all_reduce, broadcast_dealt, check_enough, deal, gathered
from fxprune.pipeline.arguments import Reach, argument
from fxprune.pipeline.contract import Pass, PassCost, PassResult, claim, shared, tracked
from fxprune.removal.removal import Removal, Scores
from fxprune.rules.products import LoneProduct, PickedMatrices, SlidingProduct, StackedProduct, lone_products
from fxprune.rules.registry import is_sum, writes


@dataclass(frozen=True)
class FitSite:
    """A product whose weight is fitted: one matrix, or a stack of them.

    Args:
        order: the axes of the weight: that of matrices, if there are several, those of outputs and inputs, and taps.
        channels: the positions kept along the axis of the weight that is summed over: ``(kept,)``, or
            ``(matrices, kept)`` where they differ.
        kept: the inputs of the matrices that stay: the channels, at each tap of a convolution.
        added: the value that the product itself adds.
        bias: whether that is a parameter that nothing else reads.
        other: the value that the product is added to; None unless that is the only use of the product.
    """

    product: LoneProduct | StackedProduct | SlidingProduct
    order: tuple[int, ...]
    channels: torch.Tensor
    kept: torch.Tensor
    added: fx.Node | None
    bias: bool
    other: fx.Node | None

    @property
    def name(self) -> str:
        return str(self.product.weight.target)

    @property
    def picked(self) -> PickedMatrices | None:
        return self.product.picked if isinstance(self.product, StackedProduct) else None

    @property
    def reads(self) -> list[fx.Node]:
        """The nodes whose dense values :func:`fit_data` reads."""
        index = None if self.picked is None else self.picked.index
        return [node for node in (self.product.node, self.other, self.added, index) if node is not None]

    def channels_of(self, matrix: int) -> torch.Tensor:
        """The channels of one matrix: ``(kept,)``."""
        return self.channels if self.channels.dim() == 1 else self.channels[matrix]

    def matrices(self, graph_module: fx.GraphModule, run: PairedRuns) -> torch.Tensor:
        """The weight in float32 at least, as ``(matrices, out, in)``, on the device that the graph runs on."""
        there = run.dense[0].env.get(self.product.weight)  # what was read for the product is not read again
        W = get_tensor(graph_module, self.name).detach().to(compute_device(graph_module)) if there is None else there
        W = W.to(torch.promote_types(W.dtype, torch.float32)).permute(self.order)
        return W if isinstance(self.product, StackedProduct) else W.flatten(1)[None]

    def weight_of(self, W: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The weight, with its axes in their own order, from its matrices and new columns for the kept inputs."""
        sizes = [self.product.weight.meta["val"].shape[i] for i in self.order]
        return put(W, 2, self.kept, columns).reshape(sizes).permute(*np.argsort(self.order).tolist())


def find_sites(graph_module: fx.GraphModule, removal: Removal, reach: Reach = "lost") -> Iterator[FitSite]:
    """Yield the products of the dense graph to fit, in order of execution; for ``reach`` see :class:`FitPass`."""
    axes, keep, device = removal.axes, removal.keep, compute_device(graph_module)
    changed = False
    for product in lone_products(graph_module):
        name = str(product.weight.target)
        block = axes.block_of(name)
        if block in removal.removed_blocks:
            changed = True
            continue
        order = (1 - product.axis, product.axis) if isinstance(product, LoneProduct) else product.order
        alone = None if isinstance(product, StackedProduct) else product
        axis = order[1 if alone else 2]
        expr = axes.tensors[name][axis]
        lost = keep.touches(expr)
        other = None if alone is None else _added_to(alone.node)
        changed = changed or lost
        reached = (reach != "lost" and other is not None) or (reach == "all" and block is not None)
        if lost or (changed and reached):
            kept = kept_positions(weight_mask(axes.tensors[name], axis, keep)) if lost else np.arange(expr.size)
            channels = torch.from_numpy(kept).to(device)
            taps = math.prod(int(product.weight.meta["val"].shape[i]) for i in order[2 if alone else 3 :])
            inputs = (channels[..., None] * taps + torch.arange(taps, device=device)).flatten(-2)
            added, bias = (None, False) if alone is None else (alone.added, bool(alone.bias))
            yield FitSite(product, order, channels, inputs, added, bias, other)


def _added_to(node: fx.Node) -> fx.Node | None:
    """The value that the product is added to; None unless that is the only use of the product."""
    users = list(node.users)
    while len(users) == 1 and users[0].target is torch.ops.aten.reshape.default:
        node, users = users[0], list(users[0].users)
    if len(users) != 1 or not is_sum(users[0]):
        return None
    others = [term for term in users[0].args[:2] if isinstance(term, fx.Node) and term is not node]
    same = (o for o in others if o.op != "get_attr" and o.meta["val"].shape == node.meta["val"].shape)
    return next(same, None)


FitData = Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]


def fit_data(site: FitSite, run: PairedRuns) -> FitData:
    """Yield, batch by batch, the number of a matrix, its inputs ``(tokens, kept)`` and targets ``(tokens, out)``.

    And whether each token is held out to judge a fit of the others by, ``(tokens,)``: those of the last quarter of the
    samples of a batch, as it is in a single process.

    The inputs are those of the masked graph. The target of a single matrix is its output in the dense graph, without
    its bias; if the product is added to another value, as in a residual stream, what the *sum* lacks. The target of one
    of several matrices is its own output in the dense graph, on the tokens that reach it in both graphs: a router may
    choose differently in each.
    """
    found = _stacked_data if isinstance(site.product, StackedProduct) else _single_data
    for matrix, X, y, held in found(site, run):
        if not (X.isfinite().all() and y.isfinite().all()):
            remedy = "Check the weights and the samples"
            raise CalibrationError("its inputs or outputs are not finite", where=site.name, remedy=remedy)
        yield matrix, X, y, held


def _held_out(run: PairedRuns, batch: int, rows: int) -> torch.Tensor:
    """Whether each row of a batch is held out: ``(rows,)``, sample by sample."""
    places, size = run.places[batch] if run.places else ((0,), 1)
    if rows % len(places):  # no rows of single samples
        places, size = (0,), 1
    each = rows // len(places)
    row = torch.arange(each)
    return torch.cat([place * each + row >= size * each * 3 // 4 for place in places])


def _single_data(site: FitSite, run: PairedRuns) -> FitData:
    other, product = site.other, site.product
    outputs = product.outputs if isinstance(product, SlidingProduct) else -1
    pairs = list(run.values(other)) if other is not None and run.has(other) else []
    for i, (dense, masked) in enumerate(zip(run.dense, run.masked, strict=True)):
        y = dense.env[product.node]
        y = (y + (pairs[i][0] - pairs[i][1]) if pairs else y).movedim(outputs, -1).flatten(0, -2)
        y = y if site.added is None else y - dense.env[site.added]
        if isinstance(product, SlidingProduct):
            x = product.inputs(masked.env, site.channels)
        else:
            x = masked.env[product.source][..., site.channels]
        yield 0, x.flatten(0, -2), y, _held_out(run, i, len(y)).to(y.device)


def _stacked_data(site: FitSite, run: PairedRuns) -> FitData:
    product = site.product
    assert isinstance(product, StackedProduct)
    for i, (dense, masked) in enumerate(zip(run.dense, run.masked, strict=True)):
        x = masked.env[product.source].permute(product.source_order)
        y = dense.env[product.node].permute(product.out_order)
        x, y = (value.reshape(len(value), -1, value.shape[-1]) for value in (x, y))
        # if every matrix sees every token, the tokens that are not routed to it come as zeros
        reached = y.any(dim=-1)
        numbers = torch.arange(len(x), device=x.device)
        if product.picked is not None:
            there, numbers = dense.env[product.picked.index], masked.env[product.picked.index]
            reached = reached & (there == numbers)[:, None]
            held = _held_out(run, i, len(x)).to(x.device)[:, None].expand_as(reached)
        else:
            held = _held_out(run, i, x.shape[1]).to(x.device).expand_as(reached)
        for matrix in numbers[reached.any(dim=-1)].unique().tolist():
            chosen = reached & (numbers == matrix)[:, None]
            yield matrix, x[chosen].index_select(1, site.channels_of(matrix)), y[chosen], held[chosen]


@dataclass(frozen=True, eq=False)
class FitPass(Pass):
    """Fits the weights that lost inputs to the outputs of the dense graph, in order of execution.

    The weights before a fitted one are fitted already, so it compensates for their remaining error; a weight that lost
    nothing can do so too.

    Processes share the samples. A subclass all-reduces what it sums, and gives the same values in all of them. Of the
    dense run it reads :attr:`FitSite.reads` alone, without which a sweep does not run the rest again.
    """

    stage: ClassVar[str] = "compensate"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, Calibration, Runnable)
    preconditions = (require_weights,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores,)
    prefetches: ClassVar[bool] = True

    samples: int | None = argument(None, "Calibration samples, evenly spread; None for all.", least=1)
    batch: int = argument(16, "Samples that run at once.", least=1)
    reach: Reach = argument(
        "lost",
        """Weights to fit: ``lost``, those that lost inputs; ``stream``, also those whose output is added to a value
        that changed, such as the output projections of attention after an MLP that shrank; ``all``, also those that
        only read such a value.""",
    )

    def cost(self, samples: int) -> PassCost:
        """The dense and the masked graph side by side, with all samples in memory; solving takes as long again."""
        taken = min(self.samples or samples, samples)
        return PassCost(runs=4.0 * taken, batch=2 * taken, outputs=0)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        removal = facts[Removal]
        sites = {site.product.node: site for site in find_sites(graph_module, removal, self.reach)}
        if not sites:
            return PassResult(graph_module, False)
        samples = spread(facts[Calibration].samples, self.samples)
        batches, places = self._share(graph_module, samples)
        # outputs of the dense run by product, as far as another prune of a sweep left them; none if ops write to some
        writing = any(map(writes, graph_module.graph.nodes))
        key = ("products", self.batch, *samples)
        known = {} if writing else shared(graph_module, key, dict[str, list[torch.Tensor]])
        targets = {node: known[node.name] for node in sites if node.name in known}
        read = [node for site in sites.values() for node in site.reads]
        run = PairedRuns(graph_module, removal, batches, places, targets, read)
        for node, site in sites.items():
            if site.picked is not None:  # the fit reads these, although the product itself does not
                run.keep_until(site.picked.weight, node)
                run.keep_until(site.picked.index, node)
        with torch.no_grad():
            # no more than the number of sites, so that the graph does not run on after the last weight
            reached = itertools.islice((sites[node] for node in run if node in sites), len(sites))
            for site in tracked(reached, self.name, len(sites)):
                outputs = [one.env[site.product.node] for one in run.dense]
                name = site.product.node.name
                if not writing and name not in known and claim(outputs, device_of(graph_module)):
                    known[name] = outputs
                for node, value in self._fit_or_resume(graph_module, site, run).items():
                    write_values(graph_module, str(node.target), value)
                    run.rerun_masked(node)
                if site.picked is not None:
                    run.rerun_masked(site.picked.node)
        add_note(graph_module, f"{len(sites)} weights were fitted by {self.name.replace('-', ' ')}")
        return PassResult(graph_module, True)

    def _share(
        self, graph_module: fx.GraphModule, samples: Sequence[Sample]
    ) -> tuple[list[dict[str, Any]], list[tuple[list[int], int]]]:
        """This process's samples of each batch, stacked, and their places in the whole batches."""
        check_enough(samples)
        whole = list(batch_indices(samples, graph_module, self.batch))
        batches, places = [], []
        mine = deal([(number, place) for number, batch in enumerate(whole) for place in range(len(batch))])
        for number, pairs in itertools.groupby(mine, itemgetter(0)):
            there = [place for _, place in pairs]
            batches.append(batched([samples[whole[number][place]] for place in there], graph_module))
            places.append((there, len(whole[number])))
        return batches, places

    def _fit_or_resume(
        self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns
    ) -> Mapping[fx.Node, torch.Tensor]:
        known = cached_tensors(f"{site.name}.fit")
        if known is not None:
            nodes = {str(node.target): node for node in graph_module.graph.nodes}
            return {nodes[name]: value for name, value in known.items()}
        release_freed()
        home = device_of(graph_module)
        fitted = self.fitted(graph_module, site, run)
        found = {node: to_device(value.contiguous(), home) for node, value in fitted.items()}
        write_cached_tensors(f"{site.name}.fit", {str(node.target): one for node, one in found.items()})
        return found

    @abstractmethod
    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        """The whole weight of ``site``, its kept inputs fitted, by the node that reads it; and its bias if fitted."""


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

    def add(self, X: torch.Tensor, D: torch.Tensor) -> None:
        X = torch.cat((X, X.new_ones(len(X), 1)), dim=1) if self.free else X
        X = X.double()  # of products in float32 the rounding depends on the batches, and a fit may amplify it
        self.square.addmm_(X.T, X)
        self.product.addmm_(X.T, D.double())

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
            mine.square.add_(others.square)
            mine.product.add_(others.product)

    def is_finite(self) -> bool:
        return all(bool(m.square.isfinite().all() and m.product.isfinite().all()) for m in self.of_each)

    def solve(self, damping: Damping, dtype: torch.dtype) -> torch.Tensor:
        """The changes of the weights, each transposed: ``(matrices, in, out)``; of those of other processes, zeros."""
        one = self.of_each[0].product
        found = one.new_zeros(len(self.of_each), *one.shape, dtype=dtype)
        for i, change in self._changes(damping):
            found[i] = change
        return found

    def error_on(self, other: StackedMoments, damping: Damping) -> float:
        """The sum of the errors on the tokens of ``other``, of each matrix from the process that has its change."""
        return sum(gathered([other.of_each[i].error(change) for i, change in self._changes(damping)]))

    def _changes(self, damping: Damping) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield this process's matrices by number, each with its change: of all at once they take much memory."""
        squares = torch.stack([moments.square.diagonal() for moments in self.of_each])
        reached = squares.any(dim=1)
        scale = squares.sum(dim=0) / reached.sum().clamp(min=1)
        for i in deal(range(len(self.of_each))):
            yield i, self.of_each[i].solve(damping, scale)


def best_damping(front: StackedMoments, back: StackedMoments) -> Damping:
    """The damping with which a fit on ``front`` does best on ``back``; infinite if none does better than no change.

    The strengths of each kind are tried from the middle of the ladder, in the direction that improves. Processes share
    the matrices, or the kinds if there is one matrix.
    """
    alone = len(front.of_each) == 1

    def error(damping: Damping) -> float:
        return back.of_each[0].error(front.of_each[0].solve(damping)) if alone else front.error_on(back, damping)

    def climb(each: bool) -> list[tuple[float, Damping]]:
        ladder = [Damping(strength, each) for strength in _LADDER]
        found = [(error(ladder[_FIRST]), ladder[_FIRST])]
        for downwards in (ladder[_FIRST + 1 :], ladder[:_FIRST][::-1]):
            tried = len(found)
            for damping in downwards:
                here = error(damping)
                if not here < found[-1][0]:
                    break
                found.append((here, damping))
            if len(found) > tried:
                break
        return found

    climbs = gathered([climb(each) for each in deal((False, True))]) if alone else [climb(False), climb(True)]
    return min([(0.0, Damping(float("inf"))), *itertools.chain(*climbs)], key=lambda pair: pair[0])[1]


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
        w = take(W, 2, site.kept)
        added = site.added if self.bias and site.bias else None
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
        found = {site.product.weight: site.weight_of(W, w + change[..., : w.shape[2]])}
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

    damping: float = argument(
        0.1,
        """Strength of the pull towards the old weight: ``d``, in units of the mean square of an output. It keeps
        directions that occur in no sample from being rotated.""",
        above=0,
    )

    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        W = site.matrices(graph_module, run)
        w = take(W, 2, site.kept)
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
        return {site.product.weight: site.weight_of(W, rotated)}
