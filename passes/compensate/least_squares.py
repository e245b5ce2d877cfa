"""Least squares: a weight that lost inputs is fitted anew, so that it gives what the dense one gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import factors, kept_mask
from fxprune.data.calibration import Calibration, stacked
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import CalibrationError
from fxprune.graph.blocks import owner_block
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.source import Source
from fxprune.graph.tensors import as_parameter, get_tensor, require_weights, set_tensor
from fxprune.masking.compare import Expected
from fxprune.masking.side_by_side import SideBySide
from fxprune.pipeline.arguments import number, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores
from fxprune.rules.product import weight_product
from fxprune.rules.registry import is_sum

__all__ = ["LeastSquaresPass"]

aten = torch.ops.aten
_DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, float("inf"))
"""Tried where none is given."""


@dataclass(frozen=True)
class _Site:
    """A product with a weight that loses inputs.

    Args:
        node: the product.
        source: the activations.
        weight: the weight.
        axis: the axis of the weight that loses.
        kept: positions along it that stay.
        bias: what is added; None if there is nothing.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    axis: int
    kept: torch.Tensor
    bias: fx.Node | None

    @property
    def name(self) -> str:
        """The name of the weight."""
        return str(self.weight.target)


@dataclass(frozen=True)
class _Moments:
    """What a fit needs to know of tokens ``X (tokens, in)`` and what they lack ``D (tokens, out)``.

    Args:
        square: ``X' X``.
        product: ``X' D``.
    """

    square: torch.Tensor
    product: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> _Moments:
        """Of no tokens yet, for a weight ``(out, in)``."""
        rows, columns = weight.shape
        zeros = weight.new_zeros(columns, columns + rows, dtype=torch.float64)
        return cls(*zeros.split((columns, rows), dim=1))

    def add(self, X: torch.Tensor, D: torch.Tensor) -> None:
        """Take in more tokens."""
        self.square.add_(X.T @ X)
        self.product.add_(X.T @ D)

    def plus(self, other: _Moments) -> _Moments:
        """Of the tokens of both."""
        return _Moments(self.square + other.square, self.product + other.product)

    def finite(self) -> bool:
        """Whether every number is one."""
        return bool(self.square.isfinite().all() and self.product.isfinite().all())

    def solve(self, damping: float) -> torch.Tensor:
        """The change of the weight, transposed: ``(in, out)``; none where the damping is infinite."""
        if damping == float("inf"):
            return torch.zeros_like(self.product)
        damped = self.square.clone()
        # the tiny number keeps inputs that are all zero from making the matrix singular
        damped.diagonal().add_(damping * self.square.diagonal().mean() + torch.finfo(torch.float32).tiny)
        return torch.cholesky_solve(self.product, torch.linalg.cholesky(damped))

    def error(self, change: torch.Tensor) -> float:
        """The squared error on these tokens after a change of the weight, less the error without it."""
        return float(((self.square @ change - 2 * self.product) * change).sum())


@dataclass(frozen=True, eq=False)
class LeastSquaresPass(Pass):
    """What stays of each weight that loses inputs gives, as nearly as it can, what the whole weight gave.

    The dense graph and the one with the plan's structures masked run side by side over the calibration data. At each
    product with a weight ``(out, in)`` that loses inputs, let ``w`` be its kept columns, ``X (kept, tokens)`` the kept
    inputs in the masked graph and ``Y (out, tokens)`` what the product gives in the dense one. The new columns are::

        w + (Y - w X) X' (X X' + d * mean(diag(X X')) * I) ^ -1

    Weights before it are fitted already, so it makes up for what they could not. Where the product is added to another
    value, as in a residual stream, ``Y`` is what the *sum* lacks, and errors do not pile up from block to block.

    Biases stay as they are, and so do weights that are used more than once or that no plain product reads: those of
    convolutions and of experts side by side. Names and shapes stay the same.

    Source: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168), sections
    3.1 (equation 1 for given channels) and 3.3 (residual branches).

    Args:
        damping: ``d``: how much the old columns count, in units of the mean square of an input; above 0. None for what
            does best, weight by weight, on a quarter of the tokens that the fit on the others has not seen; where none
            does better than no change, the weight stays.
        batch: samples that run at once.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "least-squares"
    stage: ClassVar[str] = "compensate"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, Calibration, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores, Expected)

    damping: float | None = None
    batch: int = 16
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ArgumentError: the damping is not above 0, or the batch below 1.
        """
        if self.damping is not None:
            object.__setattr__(self, "damping", number("damping", self.damping, above=0))
        object.__setattr__(self, "batch", whole_number("batch", self.batch, least=1))
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fit one weight after the other.

        Raises:
            CalibrationError: an activation is not finite.
        """
        facts = facts_of(graph_module)
        removal = facts[Removal]
        sites = {site.node: site for site in _sites(graph_module, removal)}
        if not sites:
            return PassResult(graph_module, False)
        batches = list(stacked(facts[Calibration].samples, graph_module, self.batch))
        run = SideBySide(graph_module, removal.axes, removal.keep, removal.removed_blocks, batches)
        with torch.no_grad():
            wanted = (sites[node] for node in run if node in sites)
            # the range comes first, so that the graph is not run on after the last weight
            for _, site in zip(range(len(sites)), self.track(wanted, "least squares", len(sites)), strict=False):
                self._put(graph_module, site, self._fitted(graph_module, site, run))
                run.read_again(site.weight)
        add_note(graph_module, f"{len(sites)} weights that lost inputs were fitted by least squares")
        return PassResult(graph_module, True)

    def _fitted(self, graph_module: fx.GraphModule, site: _Site, run: SideBySide) -> torch.Tensor:
        """The whole weight, its kept inputs fitted."""
        W = get_tensor(graph_module, site.name).detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        W = W if site.axis == 1 else W.T
        w = W[:, site.kept]
        front, back = _Moments.of(w), _Moments.of(w)
        for (_, x), y in zip(run.values(site.source), _targets(site, run), strict=True):
            X = x[..., site.kept].flatten(0, -2)
            D = y - X @ w.T
            parts = max(1, len(X) * 3 // 4)
            front.add(X[:parts], D[:parts])
            back.add(X[parts:], D[parts:])
        if not (front.finite() and back.finite()):
            raise CalibrationError(
                "its inputs or outputs are not finite", where=site.name, remedy="Check the weights and the samples"
            )
        damping = self.damping or min(_DAMPINGS, key=lambda d: back.error(front.solve(d)))
        change = front.plus(back).solve(damping)
        W = W.index_copy(1, site.kept, w + change.T.to(w.dtype))
        return W if site.axis == 1 else W.T

    def _put(self, graph_module: fx.GraphModule, site: _Site, value: torch.Tensor) -> None:
        """Write into the tensor itself where the model holds it too and is to change, else into a new one."""
        old, source = get_tensor(graph_module, site.name), facts_of(graph_module).get(Source)
        if source is not None and source.shares:
            old.copy_(value)
        else:
            set_tensor(graph_module, site.name, as_parameter(value.to(old.dtype).contiguous(), old))


def _sites(graph_module: fx.GraphModule, removal: Removal) -> Iterator[_Site]:
    """The products to fit, in order of execution."""
    axes, keep = removal.axes, removal.keep
    uses: dict[int, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            uses.setdefault(id(get_tensor(graph_module, str(node.target))), []).extend(node.users)
    for node in graph_module.graph.nodes:
        product = weight_product(node)
        if product is None:
            continue
        name, tensor = str(product.weight.target), get_tensor(graph_module, str(product.weight.target))
        alone = len(uses[id(tensor)]) == 1 and isinstance(tensor, nn.Parameter) and tensor.dim() == 2
        rows = product.source.meta["val"].dim() >= 2
        if not (alone and rows) or owner_block(name, axes.blocks) in removal.removed_blocks:
            continue
        expr = axes.tensors[name][product.axis]
        if any(keep.touches(factor) for factor in factors(expr)):
            kept = torch.from_numpy(np.flatnonzero(kept_mask(expr, keep))).to(tensor.device)
            yield _Site(node, product.source, product.weight, product.axis, kept, product.added)


def _targets(site: _Site, run: SideBySide) -> Iterator[torch.Tensor]:
    """For each batch what the product has to give without its bias: ``(tokens, out)``."""
    other = _added_to(site.node)
    pairs = list(run.values(other)) if other is not None and run.has(other) else []
    for i, dense in enumerate(run.dense):
        y = dense.env[site.node].flatten(0, -2)
        y = y if site.bias is None else y - dense.env[site.bias]
        yield y + (pairs[i][0] - pairs[i][1]).flatten(0, -2) if pairs else y


def _added_to(node: fx.Node) -> fx.Node | None:
    """The value that the product is added to, where that is all that happens to it."""
    user = _only_user(node)
    while user is not None and user.target is aten.reshape.default:
        node, user = user, _only_user(user)
    if user is None or not is_sum(user):
        return None
    others = [term for term in user.args[:2] if isinstance(term, fx.Node) and term is not node]
    same = [o for o in others if o.op != "get_attr" and o.meta["val"].shape == node.meta["val"].shape]
    return same[0] if same else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
