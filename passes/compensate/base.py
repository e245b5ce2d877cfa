"""Base of compensation passes: dense and masked graph side by side, one weight fitted at a time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.axes import factors, kept_mask
from fxprune.data.calibration import Calibration, Sample, batch_indices, batched, spread
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Change, Fact, Runnable, Source, add_note, facts_of
from fxprune.graph.tensors import device_of, get_tensor, require_weights
from fxprune.masking.compare import PairedRuns
from fxprune.offload.files import cached, caching, release_freed, write_values
from fxprune.offload.prefetch import compute_device, to_device
from fxprune.offload.ranks import check_enough, deal
from fxprune.pipeline.arguments import Reach, argument
from fxprune.pipeline.contract import Pass, PassCost, PassResult, claim, shared, tracked
from fxprune.removal.removal import Removal, Scores
from fxprune.rules.products import (
    LoneProduct,
    PickedMatrices,
    SlidingProduct,
    StackedProduct,
    lone_products,
    lone_sliding_products,
    lone_stacked_products,
)
from fxprune.rules.registry import is_sum, writes

aten = torch.ops.aten

Product = LoneProduct | StackedProduct | SlidingProduct


@dataclass(frozen=True)
class FitSite:
    """A product whose weight is fitted: one matrix, or a stack of them.

    Args:
        channels: the positions kept along the axis of the weight that is summed over.
        other: the value that the product is added to; None unless that is the only use of the product.
    """

    product: Product
    channels: torch.Tensor
    other: fx.Node | None

    @property
    def weight(self) -> fx.Node:
        return self.product.weight

    @property
    def name(self) -> str:
        return str(self.product.weight.target)

    @property
    def added(self) -> fx.Node | None:
        return None if isinstance(self.product, StackedProduct) else self.product.added

    @property
    def bias(self) -> fx.Node | None:
        """The node of the parameter that the product adds, if nothing else reads that parameter."""
        product = self.product
        return self.added if not isinstance(product, StackedProduct) and product.bias else None

    @property
    def picked(self) -> PickedMatrices | None:
        return self.product.picked if isinstance(self.product, StackedProduct) else None

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose dense values :func:`fit_data` reads."""
        index = None if self.picked is None else self.picked.index
        return tuple(node for node in (self.product.node, self.other, self.added, index) if node is not None)

    @property
    def kept(self) -> torch.Tensor:
        """The inputs of the matrices that stay: the channels, at each tap of a convolution."""
        if not isinstance(self.product, SlidingProduct):
            return self.channels
        taps = math.prod(int(self.weight.meta["val"].shape[i]) for i in self.product.order[2:])
        places = self.channels[:, None] * taps + torch.arange(taps, device=self.channels.device)
        return places.flatten()

    def matrices(self, graph_module: fx.GraphModule, run: PairedRuns) -> torch.Tensor:
        """The weight in float32 at least, as ``(matrices, out, in)``, on the device that the graph runs on."""
        there = run.dense[0].env.get(self.weight)  # what was read for the product is not read again
        W = get_tensor(graph_module, self.name).detach().to(compute_device(graph_module)) if there is None else there
        W = W.to(torch.promote_types(W.dtype, torch.float32)).permute(_weight_order(self.product))
        return W if isinstance(self.product, StackedProduct) else W.flatten(1)[None]

    def weight_of(self, matrices: torch.Tensor) -> torch.Tensor:
        """The weight, with its axes in their own order, from its matrices ``(matrices, out, in)``."""
        order = _weight_order(self.product)
        sizes = [self.weight.meta["val"].shape[i] for i in order]
        return matrices.reshape(sizes).permute(*np.argsort(order).tolist())


def _weight_order(product: Product) -> tuple[int, ...]:
    """The axes of the weight: that of matrices, if there are several, those of outputs and inputs, and taps."""
    return (1 - product.axis, product.axis) if isinstance(product, LoneProduct) else product.order


def find_sites(graph_module: fx.GraphModule, removal: Removal, reach: Reach = "lost") -> Iterator[FitSite]:
    """Yield the products of the dense graph to fit, in order of execution; for ``reach`` see :class:`FitPass`."""
    axes, keep = removal.axes, removal.keep
    kinds = (lone_products, lone_stacked_products, lone_sliding_products)
    products: dict[fx.Node, Product] = {product.node: product for kind in kinds for product in kind(graph_module)}
    changed = False
    for product in (products[node] for node in graph_module.graph.nodes if node in products):
        name = str(product.weight.target)
        block = axes.block_of(name)
        if block in removal.removed_blocks:
            changed = True
            continue
        stacked_weights = isinstance(product, StackedProduct)
        expr = axes.tensors[name][_weight_order(product)[2 if stacked_weights else 1]]
        lost = any(keep.touches(factor) for factor in factors(expr))
        other = None if stacked_weights else _added_to(product.node)
        changed = changed or lost
        reached = (reach != "lost" and other is not None) or (reach == "all" and block is not None)
        if lost or (changed and reached):
            kept = np.flatnonzero(kept_mask(expr, keep)) if lost else np.arange(expr.size)
            yield FitSite(product, torch.from_numpy(kept).to(compute_device(graph_module)), other)


def _added_to(node: fx.Node) -> fx.Node | None:
    """The value that the product is added to; None unless that is the only use of the product."""
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
    assert not isinstance(product, StackedProduct)
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
        x = masked.env[product.source].permute(product.source_order)[..., site.channels]
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
            yield matrix, x[chosen], y[chosen], held[chosen]


@dataclass(frozen=True, eq=False)
class FitPass(Pass):
    """Fits the weights that lost inputs to the outputs of the dense graph, in order of execution.

    The weights before a fitted one are fitted already, so it compensates for their remaining error; a weight that lost
    nothing can do so too.

    Processes share the samples. A subclass all-reduces what it sums, and gives the same values in all of them.
    """

    stage: ClassVar[str] = "compensate"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, Calibration, Runnable)
    preconditions = (require_weights,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores,)
    prefetches: ClassVar[bool] = True
    reads_targets_alone: ClassVar[bool] = False
    """Whether of the dense run a fit reads :attr:`FitSite.reads` and nothing else, so that a sweep runs it once."""

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
        known = self._known(graph_module, samples)
        run = PairedRuns(
            graph_module,
            removal,
            batches,
            places,
            known={node: known[node.name] for node in sites if known and node.name in known},
            read=[node for site in sites.values() for node in site.reads],
        )
        for node, site in sites.items():
            if site.picked is not None:  # the fit reads these, although the product itself does not
                run.keep_until(site.picked.weight, node)
                run.keep_until(site.picked.index, node)
        with torch.no_grad():
            # no more than the number of sites, so that the graph does not run on after the last weight
            reached = islice((sites[node] for node in run if node in sites), len(sites))
            for site in tracked(reached, self.name, len(sites)):
                outputs = [one.env[site.product.node] for one in run.dense]
                name = site.product.node.name
                if known is not None and name not in known and claim(outputs, device_of(graph_module)):
                    known[name] = outputs
                for node, value in self._fit_or_resume(graph_module, site, run).items():
                    write_values(graph_module, str(node.target), value)
                    run.rerun_masked(node)
                if site.picked is not None:
                    run.rerun_masked(site.picked.node)
        add_note(graph_module, f"{len(sites)} weights were fitted by {self.name.replace('-', ' ')}")
        return PassResult(graph_module, True)

    def _known(self, graph_module: fx.GraphModule, samples: Sequence[Sample]) -> dict[str, list[torch.Tensor]] | None:
        """Outputs of the products of the dense run, by node, as far as another prune of a sweep left them.

        None if they cannot be left for others: a fit reads more, or an op writes to them.
        """
        if not self.reads_targets_alone or any(map(writes, graph_module.graph.nodes)):
            return None
        return shared(graph_module, ("products", self.batch, *samples), dict[str, list[torch.Tensor]])

    def _share(
        self, graph_module: fx.GraphModule, samples: Sequence[Sample]
    ) -> tuple[list[dict[str, Any]], list[tuple[list[int], int]]]:
        """This process's samples of each batch, stacked, and their places in the whole batches."""
        check_enough(samples)
        whole = list(batch_indices(samples, graph_module, self.batch))
        batches, places = [], []
        mine = deal([(number, place) for number, batch in enumerate(whole) for place in range(len(batch))])
        for number, pairs in groupby(mine, itemgetter(0)):
            there = [place for _, place in pairs]
            batches.append(batched([samples[whole[number][place]] for place in there], graph_module))
            places.append((there, len(whole[number])))
        return batches, places

    def _fit_or_resume(
        self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns
    ) -> Mapping[fx.Node, torch.Tensor]:
        known = cached(f"{site.name}.fit")
        if known is not None:
            nodes = {str(node.target): node for node in graph_module.graph.nodes}
            return {nodes[name]: value for name, value in load_file(known).items()}
        release_freed()
        home = device_of(graph_module)
        fitted = self.fitted(graph_module, site, run)
        found = {node: to_device(value.contiguous(), home) for node, value in fitted.items()}
        with caching(f"{site.name}.fit") as file:
            if file is not None:
                save_file({str(node.target): value for node, value in found.items()}, file)
        return found

    @abstractmethod
    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        """The whole weight of ``site``, its kept inputs fitted, by the node that reads it; and its bias if fitted."""
