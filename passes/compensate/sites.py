"""The products whose weights are fitted, and what each has to give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.axes import factors, kept_mask
from fxprune.graph.blocks import owner_block
from fxprune.graph.tensors import get_tensor
from fxprune.masking.side_by_side import SideBySide
from fxprune.removal.removal import Removal
from fxprune.rules.product import LoneProduct, lone_products
from fxprune.rules.registry import is_sum

__all__ = ["Site", "find_sites", "targets"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A product whose weight is fitted.

    Args:
        product: the product.
        kept: positions along the axis of the weight that is summed over that stay.
        other: the value that the product is added to, where that is all that happens to it.
    """

    product: LoneProduct
    kept: torch.Tensor
    other: fx.Node | None

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.product.name


def find_sites(graph_module: fx.GraphModule, removal: Removal, reach: str = "lost") -> Iterator[Site]:
    """Yield the products to fit, in order of execution.

    Args:
        graph_module: the dense graph.
        removal: what goes.
        reach: one of :data:`fxprune.pipeline.words.REACHES`.
    """
    axes, keep = removal.axes, removal.keep
    changed = False
    for product in lone_products(graph_module):
        if owner_block(product.name, axes.blocks) in removal.removed_blocks:
            changed = True
            continue
        expr = axes.tensors[product.name][product.axis]
        lost = any(keep.touches(factor) for factor in factors(expr))
        other = _added_to(product.node)
        changed = changed or lost
        inside = owner_block(product.name, axes.blocks) is not None
        if lost or (changed and ((reach != "lost" and other is not None) or (reach == "all" and inside))):
            kept = np.flatnonzero(kept_mask(expr, keep)) if lost else np.arange(expr.size)
            yield Site(product, torch.from_numpy(kept).to(get_tensor(graph_module, product.name).device), other)


def targets(site: Site, run: SideBySide) -> Iterator[torch.Tensor]:
    """For each batch what the product has to give without its bias: ``(tokens, out)``.

    Where the product is added to another value, as in a residual stream, it is what the *sum* lacks.
    """
    added, other = site.product.added, site.other
    pairs = list(run.values(other)) if other is not None and run.has(other) else []
    for i, dense in enumerate(run.dense):
        y = dense.env[site.product.node].flatten(0, -2)
        y = y if added is None else y - dense.env[added]
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
