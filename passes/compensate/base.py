"""Base of compensation passes: dense and masked graph side by side, one weight fitted at a time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.axes import factors, kept_mask
from fxprune.data.calibration import Calibration, spread, stacked
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of, owner_block
from fxprune.graph.tensors import device_of, get_tensor, require_weights
from fxprune.masking.compare import Expected, SideBySide
from fxprune.offload.files import put_values, recalled, remembering
from fxprune.offload.prefetch import place_of, to_place
from fxprune.offload.ranks import as_first, own
from fxprune.pipeline.arguments import REACHES, one_of, whole_number
from fxprune.pipeline.contract import Pass, PassResult, Track, check_track, no_progress
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores
from fxprune.rules.products import (
    LoneProduct,
    SlidingProduct,
    StackedProduct,
    lone_products,
    lone_sliding_products,
    lone_stacked_products,
)
from fxprune.rules.registry import is_sum

__all__ = ["FitPass", "Site", "find_sites", "pairs", "tokens"]

aten = torch.ops.aten

Product = LoneProduct | StackedProduct | SlidingProduct


@dataclass(frozen=True)
class Site:
    """A product whose weight is fitted: one matrix, or several side by side.

    Args:
        product: the product.
        channels: positions along the axis of the weight that is summed over that stay.
        other: the value that the product is added to, where that is all that happens to it.
    """

    product: Product
    channels: torch.Tensor
    other: fx.Node | None

    @property
    def weight(self) -> fx.Node:
        """What reads the weight."""
        return self.product.weight

    @property
    def name(self) -> str:
        """The name of the weight."""
        return str(self.product.weight.target)

    @property
    def added(self) -> fx.Node | None:
        """What the product adds, if it adds anything."""
        return None if isinstance(self.product, StackedProduct) else self.product.added

    @property
    def bias(self) -> fx.Node | None:
        """What reads the parameter that the product adds, where nothing else reads it."""
        product = self.product
        return self.added if not isinstance(product, StackedProduct) and product.bias else None

    @property
    def behind(self) -> tuple[fx.Node, ...]:
        """What the product reads instead of the weight itself."""
        picked = self.product.picked if isinstance(self.product, StackedProduct) else None
        return () if picked is None else (picked.node,)

    @property
    def held(self) -> tuple[fx.Node, ...]:
        """What has to be there when the product is run, although the product itself does not read it."""
        picked = self.product.picked if isinstance(self.product, StackedProduct) else None
        return () if picked is None else (picked.weight, picked.index)

    @property
    def kept(self) -> torch.Tensor:
        """Which inputs of the matrices stay: the channels, at each tap where there are taps."""
        if not isinstance(self.product, SlidingProduct):
            return self.channels
        taps = math.prod(int(self.weight.meta["val"].shape[i]) for i in self.product.order[2:])
        places = self.channels[:, None] * taps + torch.arange(taps, device=self.channels.device)
        return places.flatten()

    def matrices(self, graph_module: fx.GraphModule) -> torch.Tensor:
        """The weight in float32 at least, as ``(matrices, out, in)``, on the device that the graph runs on."""
        W = get_tensor(graph_module, self.name).detach().to(place_of(graph_module))
        W = W.to(torch.promote_types(W.dtype, torch.float32)).permute(_order(self.product))
        return W if isinstance(self.product, StackedProduct) else W.flatten(1)[None]

    def weight_of(self, matrices: torch.Tensor) -> torch.Tensor:
        """The weight that has these matrices, its axes in their own order."""
        order = _order(self.product)
        sizes = [self.weight.meta["val"].shape[i] for i in order]
        return matrices.reshape(sizes).permute(*np.argsort(order).tolist())


def _order(product: Product) -> tuple[int, ...]:
    """The axes of the weight: that of matrices, where there are several, those of outputs and inputs, and taps."""
    return (1 - product.axis, product.axis) if isinstance(product, LoneProduct) else product.order


def find_sites(graph_module: fx.GraphModule, removal: Removal, reach: str = "lost") -> Iterator[Site]:
    """Yield the products to fit, in order of execution.

    Args:
        graph_module: the dense graph.
        removal: what goes.
        reach: one of :data:`fxprune.pipeline.arguments.REACHES`.
    """
    axes, keep = removal.axes, removal.keep
    changed = False
    for product in _products(graph_module):
        name = str(product.weight.target)
        if owner_block(name, axes.blocks) in removal.removed_blocks:
            changed = True
            continue
        order = _order(product)
        summed = order[2] if isinstance(product, StackedProduct) else order[1]
        expr = axes.tensors[name][summed]
        lost = any(keep.touches(factor) for factor in factors(expr))
        other = None if isinstance(product, StackedProduct) else _added_to(product.node)
        changed = changed or lost
        inside = owner_block(name, axes.blocks) is not None
        if lost or (changed and ((reach != "lost" and other is not None) or (reach == "all" and inside))):
            kept = np.flatnonzero(kept_mask(expr, keep)) if lost else np.arange(expr.size)
            yield Site(product, torch.from_numpy(kept).to(place_of(graph_module)), other)


def _products(graph_module: fx.GraphModule) -> Iterator[Product]:
    """The products of all kinds, in order of execution."""
    kinds = (lone_products, lone_stacked_products, lone_sliding_products)
    found: dict[fx.Node, Product] = {product.node: product for kind in kinds for product in kind(graph_module)}
    return (found[node] for node in graph_module.graph.nodes if node in found)


def tokens(site: Site, run: SideBySide) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield which matrix it is, its inputs ``(tokens, kept)`` in the masked graph and what is wanted ``(tokens, out)``.

    One matrix is wanted to give what it gives in the dense graph, without its bias; where the product is added to
    another value, as in a residual stream, what the *sum* lacks. Of several each is wanted to give what the same one
    gives in the dense graph, on the tokens that reach it there too: in either graph a router may choose others.
    """
    product = site.product
    if isinstance(product, StackedProduct):
        yield from _stacked_tokens(product, site.channels, run)
        return
    for masked, y in zip(run.masked, _targets(site, run), strict=True):
        if isinstance(product, SlidingProduct):
            yield 0, product.inputs(masked.env, site.channels).flatten(0, -2), y
        else:
            yield 0, masked.env[product.source][..., site.channels].flatten(0, -2), y


def _targets(site: Site, run: SideBySide) -> Iterator[torch.Tensor]:
    """For each batch what a product with one matrix has to give without its bias: ``(tokens, out)``."""
    other, product = site.other, site.product
    outputs = product.outputs if isinstance(product, SlidingProduct) else -1
    pairs = list(run.values(other)) if other is not None and run.has(other) else []
    for i, dense in enumerate(run.dense):
        y = dense.env[product.node]
        y = (y + (pairs[i][0] - pairs[i][1]) if pairs else y).movedim(outputs, -1).flatten(0, -2)
        yield y if site.added is None else y - dense.env[site.added]


def _stacked_tokens(
    product: StackedProduct, kept: torch.Tensor, run: SideBySide
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for dense, masked in zip(run.dense, run.masked, strict=True):
        x = masked.env[product.source].permute(product.source_order)[..., kept]
        y = dense.env[product.node].permute(product.out_order)
        x, y = (value.reshape(len(value), -1, value.shape[-1]) for value in (x, y))
        # where every matrix sees every token, those that are not meant for it come as zeros
        reached = y.any(dim=-1)
        numbers = torch.arange(len(x), device=x.device)
        if product.picked is not None:
            there, numbers = dense.env[product.picked.index], masked.env[product.picked.index]
            reached = reached & (there == numbers)[:, None]
        for matrix in numbers[reached.any(dim=-1)].unique().tolist():
            chosen = reached & (numbers == matrix)[:, None]
            yield matrix, x[chosen], y[chosen]


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


@dataclass(frozen=True, eq=False)
class FitPass(Pass):
    """Fits weights that lost inputs, in order of execution, to what the dense graph computes.

    Weights before a fitted one are fitted already, so it makes up for what they could not; and one that lost nothing
    can make up for what those before it lost.

    Args:
        samples: calibration samples to take, evenly spread; None for all.
        batch: samples that run at once.
        reach: ``lost``: fit the weights that lost inputs; ``stream``: and those whose output is added to a value that
            changed, such as the projections of attention behind a feed-forward network that shrank; ``all``: and those
            that only read such a value.
        track: shows progress, as ``track(items, what, total)``.
    """

    stage: ClassVar[str] = "compensate"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, Calibration, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores, Expected)
    carries: ClassVar[bool] = True

    samples: int | None = None
    batch: int = 16
    reach: str = "lost"
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        object.__setattr__(self, "batch", whole_number("batch", self.batch, least=1))
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        one_of("reach", self.reach, REACHES)
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
        sites = {site.product.node: site for site in find_sites(graph_module, removal, self.reach)}
        if not sites:
            return PassResult(graph_module, False)
        samples = own(spread(facts[Calibration].samples, self.samples))
        batches = list(stacked(samples, graph_module, self.batch))
        run = SideBySide(graph_module, removal.axes, removal.keep, removal.removed_blocks, batches)
        for node, site in sites.items():
            for held in site.held:
                run.hold(held, node)
        with torch.no_grad():
            wanted = (sites[node] for node in run if node in sites)
            # the range comes first, so that the graph is not run on after the last weight
            for _, site in zip(range(len(sites)), self.track(wanted, self.name, len(sites)), strict=False):
                for node, value in self._recalled(graph_module, site, run).items():
                    put_values(graph_module, str(node.target), value)
                    run.read_again(node)
                run.read_again(*site.behind)
        add_note(graph_module, f"{len(sites)} weights were fitted by {self.name.replace('-', ' ')}")
        return PassResult(graph_module, True)

    def _recalled(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return what an earlier run fitted, or fit it."""
        known = recalled(f"{site.name}.fit")
        if known is not None:
            name = {str(node.target): node for node in graph_module.graph.nodes}
            return {name[key]: value for key, value in load_file(known).items()}
        home = device_of(graph_module)
        fitted = self.fitted(graph_module, site, run)
        found = {node: to_place(value.contiguous(), home) for node, value in fitted.items()}
        as_first(found.values())
        with remembering(f"{site.name}.fit") as file:
            if file is not None:
                save_file({str(node.target): value for node, value in found.items()}, file)
        return found

    @abstractmethod
    def fitted(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return the whole weight of ``site``, its kept inputs fitted, by what reads it; and its bias, where it moves.

        Raises:
            CalibrationError: an activation is not finite.
        """


def pairs(site: Site, run: SideBySide) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield for each batch, and each matrix of the weight that has tokens there, what :func:`.sites.tokens` yields.

    Raises:
        CalibrationError: one of them is not finite.
    """
    for matrix, X, y in tokens(site, run):
        if not (X.isfinite().all() and y.isfinite().all()):
            raise CalibrationError(
                "its inputs or outputs are not finite", where=site.name, remedy="Check the weights and the samples"
            )
        yield matrix, X, y
