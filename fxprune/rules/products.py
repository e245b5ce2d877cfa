"""Products of activations and weights: dense, convolutional, or batched over experts.

An *exclusive* parameter is one that a single node reads, under this name or any other: its values may be changed
without changing anything else.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from fxprune.axes import UNIT, Expr
from fxprune.graph.compat import UNKNOWN_SIZE
from fxprune.graph.tensors import get_tensor, tensor_name
from fxprune.rules.apply import apply_rule_alone
from fxprune.rules.registry import Values, find_rule, values_of
from fxprune.rules.site import OpArguments


@dataclass(frozen=True)
class Contraction:
    """An op that multiplies two tensors and sums over one axis, and does nothing else to them.

    Axis ``i`` of ``source`` and axis ``axis`` of ``weight`` are summed over; ``x``, ``w`` and ``out`` are the axes of
    the two and of the result.
    """

    source: fx.Node
    x: list[Expr]
    i: int
    weight: fx.Node
    w: list[Expr]
    axis: int
    out: list[Expr]
    added: fx.Node | None


def contractions(node: fx.Node) -> Iterator[Contraction]:
    """The contractions that ``node`` is, with either tensor as the weight; the other is not read from the model."""
    rule = find_rule(node.target)
    if rule is None or rule.values is not Values.PRODUCT:
        return
    arguments = OpArguments(node)
    if any(arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
        return
    site, stated = apply_rule_alone(node)
    summed = stated.sums.get(node.name, ())
    if len(summed) != 1 or len(summed[0]) != 2 or len(site.outs) != 1:
        return
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    axes = {x.name: [stated.solver.resolve(axis) for axis in x.axes] for x in (*site.tensors, site.out)}
    found = arguments.get(rule.added) if rule.added else None
    added = found if isinstance(found, fx.Node) else None
    for a, b in itertools.permutations(summed[0]):
        if nodes[a.tensor].op != "get_attr":
            x, w = axes[a.tensor], axes[b.tensor]
            yield Contraction(nodes[a.tensor], x, a.dim, nodes[b.tensor], w, b.dim, axes[site.out.name], added)


@dataclass(frozen=True)
class LoneProduct:
    """``out[.., o] = sum over i of source[.., i] * weight[..]``, plus ``added``; ``axis`` of the weight is summed.

    The weight has two axes. ``bias`` names the added tensor if it is an exclusive parameter with one axis.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    axis: int
    added: fx.Node | None
    bias: str | None = None

    @property
    def name(self) -> str:
        return str(self.weight.target)


def weight_product(node: fx.Node) -> LoneProduct | None:
    """The product that ``node`` is, of activations and a weight of two axes; None if it is anything else."""
    for found in contractions(node) if _reads_weight(node) else ():
        x, w, out = found.x, found.w, found.out
        is_matrix = found.weight.op == "get_attr" and len(w) == 2
        if is_matrix and found.i == len(x) - 1 and len(out) == len(x) and out[-1] == w[1 - found.axis]:
            return LoneProduct(node, found.source, found.weight, found.axis, found.added)
    return None


def _reads_weight(node: fx.Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes)


@dataclass(frozen=True)
class SlidingProduct:
    """``out[.., o, ..] = sum over i and taps of weight[o, i, taps..] * inputs[.., i, taps..]``, plus an optional bias.

    The inputs are the numbers of ``source``, or padding zeros, that the op multiplies with each entry of the weight;
    each has all channels, which are summed over as one axis. The weight has three axes or more, in any order.

    Args:
        channel: the axis of the activations that is summed over.
        order: all axes of the weight: that of outputs, that of inputs, then the taps.
        outputs: the axis of the result that has the outputs.
        bias: whether the added tensor is an exclusive parameter with one axis.
    """

    node: fx.Node
    source: fx.Node
    channel: int
    weight: fx.Node
    order: tuple[int, ...]
    outputs: int
    added: fx.Node | None
    bias: bool = False

    def inputs(self, env: Mapping[fx.Node, Any], kept: torch.Tensor) -> torch.Tensor:
        """The inputs multiplied with each entry of the weight: ``(.., kept * taps)``, other axes as in the result.

        They are the op's own outputs for an identity weight, which has one output for each entry. ``env`` has values of
        the nodes that the product reads, ``kept`` the wanted channels.
        """
        weight, x = env[self.weight], env[self.source]
        sizes = [len(kept), *(weight.shape[i] for i in self.order[2:])]
        units = torch.eye(torch.Size(sizes).numel(), dtype=x.dtype, device=x.device)
        to_weight = sorted(range(len(self.order)), key=self.order.__getitem__)
        given = {
            self.source: x.index_select(self.channel, kept),
            self.weight: units.view(-1, *sizes).permute(to_weight),
            self.added: None,
        }
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: given[n] if n in given else env[n])
        found: torch.Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return found.movedim(self.outputs, -1)


def sliding_product(node: fx.Node) -> SlidingProduct | None:
    """The product that ``node`` is, of activations and a weight with taps, outputs reading all channels; or None."""
    for found in contractions(node) if _reads_weight(node) else ():
        x, w, out = found.x, found.w, found.out
        free = [j for j in range(len(w)) if j != found.axis]
        passed = [j for j in free if w[j] is not UNIT and out.count(w[j]) == 1 and w[j] not in x]
        taps = [j for j in free if j not in passed]
        if found.weight.op != "get_attr" or len(w) < 3 or len(passed) != 1 or not _sizes_are_known(x):
            continue
        is_summed = w[found.axis] is not UNIT and x[found.i] == w[found.axis]
        if is_summed and not any(w[j] is not UNIT and w[j] in (*x, *out) for j in taps):
            order, outputs = (passed[0], found.axis, *taps), out.index(w[passed[0]])
            return SlidingProduct(node, found.source, found.i, found.weight, order, outputs, found.added)
    return None


def _sizes_are_known(exprs: Sequence[Expr]) -> bool:
    return all(expr.size != UNKNOWN_SIZE for expr in exprs)


@dataclass(frozen=True)
class PickedMatrices:
    """Matrices ``(picks, .., ..)`` that ``node`` picks by the numbers in ``index`` from a weight of three axes.

    Args:
        along: the axis of the result that has the picks.
        axes: for each axis of the result the axis of the weight that it is, or that it was picked along.
    """

    node: fx.Node
    weight: fx.Node
    index: fx.Node
    along: int
    axes: tuple[int, ...]


@dataclass(frozen=True)
class StackedProduct:
    """``out[b, .., o] = sum over i of source[b, .., i] * weight[m, o, i]``, with ``m`` either ``b`` or ``index[b]``.

    The axes of each tensor may be in any order; other axes are the same in ``source`` and ``out``. No size depends on
    the data.

    Args:
        order: the axes of the weight: that of matrices, of outputs and of inputs.
        source_order: all axes of the activations, that of matrices first and that of inputs last.
        out_order: all axes of the result, that of matrices first and that of outputs last.
        picked: the matrices picked for each ``b``; None if ``m`` is ``b``.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    order: tuple[int, int, int]
    source_order: tuple[int, ...]
    out_order: tuple[int, ...]
    picked: PickedMatrices | None


def picked_matrices(node: fx.Node) -> PickedMatrices | None:
    """The matrices that ``node`` picks by number from a weight of three axes; None if it does anything else."""
    if values_of(node) is not Values.PICKED or len(node.all_input_nodes) != 2:
        return None
    site, stated = apply_rule_alone(node)
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    if len(stated.lookups) != 1 or stated.lookups[0].index not in nodes or len(site.outs) != 1:
        return None
    index = nodes[stated.lookups[0].index]
    (weight,) = (source for source in nodes.values() if source is not index)
    w, numbers = site.of(weight), site.of(index)
    if weight.op != "get_attr" or w is None or numbers is None or (w.rank, numbers.rank, site.out.rank) != (3, 1, 3):
        return None
    if index.meta["val"].dtype not in (torch.int64, torch.int32):
        return None  # a boolean mask picks an unknown number of matrices
    along = [i for i, axis in enumerate(w.axes) if axis == stated.lookups[0].expr]
    exprs = [stated.solver.resolve(axis) for axis in w.axes]
    found = [_only(exprs, stated.solver.resolve(axis)) for axis in site.out.axes]
    passed = [i for i in found if i is not None]
    if len(along) != 1 or sorted(passed) != [i for i in range(3) if i != along[0]]:
        return None
    return PickedMatrices(node, weight, index, found.index(None), tuple(along[0] if i is None else i for i in found))


def stacked_product(node: fx.Node) -> StackedProduct | None:
    """The product that ``node`` is, of activations and one matrix each of a weight of three axes; or None."""
    for found in contractions(node):
        picked = picked_matrices(found.weight)
        weight = found.weight if picked is None else picked.weight
        if weight.op != "get_attr" or len(found.w) != 3 or found.added is not None or not _sizes_are_known(found.x):
            continue
        axes = _stacked_axes(found)
        if axes is not None and (picked is None or picked.along == axes[0]):
            stack, passed, source_order, out_order = axes
            of = range(3) if picked is None else picked.axes
            order = (of[stack], of[passed], of[found.axis])
            return StackedProduct(node, found.source, weight, order, source_order, out_order, picked)
    return None


def _stacked_axes(found: Contraction) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """The weight's axes of matrices and of outputs, and the order of the axes of activations and result; or None."""
    x, w, out = found.x, found.w, found.out
    free = [j for j in range(3) if j != found.axis]
    stacks = [j for j in free if _only(x, w[j]) is not None and _only(out, w[j]) is not None]
    passed = [j for j in free if w[j] not in x and _only(out, w[j]) is not None]
    if len(stacks) != 1 or len(passed) != 1:
        return None
    first, last, at = _only(x, w[stacks[0]]), _only(out, w[passed[0]]), _only(out, w[stacks[0]])
    assert first is not None and last is not None and at is not None
    rows = [i for i in range(len(x)) if i not in (first, found.i)]
    out_rows = [i for i in range(len(out)) if i not in (at, last)]
    if [x[i] for i in rows] != [out[i] for i in out_rows]:
        return None
    return stacks[0], passed[0], (first, *rows, found.i), (at, *out_rows, last)


def _only(exprs: Sequence[Expr], wanted: Expr) -> int | None:
    """The only place of ``wanted`` among axes; None if there is none or there are several, or it has size 1."""
    places = [i for i, expr in enumerate(exprs) if expr == wanted]
    return places[0] if len(places) == 1 and wanted is not UNIT else None


def lone_products(graph_module: fx.GraphModule) -> Iterator[LoneProduct | StackedProduct | SlidingProduct]:
    """Yield the products with an exclusive weight, in order; those of a single row and a matrix are left out."""
    exclusive = _exclusive_parameters(graph_module)
    for node in graph_module.graph.nodes:
        found = weight_product(node) or sliding_product(node) or stacked_product(node)
        if found is None or found.weight not in exclusive:
            continue
        if isinstance(found, StackedProduct):
            if found.picked is None or len(found.picked.node.users) == 1:
                yield found
        elif isinstance(found, SlidingProduct):
            yield replace(found, bias=_is_bias(found.added, exclusive))
        elif found.source.meta["val"].dim() >= 2:
            yield replace(found, bias=str(found.added.target) if _is_bias(found.added, exclusive) else None)


def _exclusive_parameters(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that read an exclusive parameter."""
    read = {n: get_tensor(graph_module, str(n.target)) for n in graph_module.graph.nodes if n.op == "get_attr"}
    uses = Counter(id(tensor) for node, tensor in read.items() for _ in node.users)
    return {node for node, tensor in read.items() if isinstance(tensor, nn.Parameter) and uses[id(tensor)] == 1}


def _is_bias(added: fx.Node | None, exclusive: Container[fx.Node]) -> TypeGuard[fx.Node]:
    return added is not None and added in exclusive and added.meta["val"].dim() == 1
