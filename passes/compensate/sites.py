"""The products whose weights are fitted, and what each takes and has to give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.axes import factors, kept_mask
from fxprune.graph.blocks import owner_block
from fxprune.graph.carrier import place_of
from fxprune.graph.tensors import get_tensor
from fxprune.masking.side_by_side import SideBySide
from fxprune.removal.removal import Removal
from fxprune.rules.product import LoneProduct, lone_products
from fxprune.rules.registry import is_sum
from fxprune.rules.sliding import SlidingProduct, lone_sliding_products
from fxprune.rules.stacked import StackedProduct, lone_stacked_products

__all__ = ["Site", "find_sites", "tokens"]

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
        reach: one of :data:`fxprune.pipeline.words.REACHES`.
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
