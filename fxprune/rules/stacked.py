"""Products of activations with matrices that lie side by side in one parameter, for any op that says it multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxprune.axes import UNIT, Expr
from fxprune.graph.compat import UNKNOWN_SIZE
from fxprune.graph.names import tensor_name
from fxprune.rules.apply import run_alone
from fxprune.rules.product import Contraction, contractions, lone_parameters
from fxprune.rules.registry import Values, find_rule

__all__ = ["Picked", "StackedProduct", "lone_stacked_products", "picked_matrices", "stacked_product"]


@dataclass(frozen=True)
class Picked:
    """Matrices ``(picks, .., ..)`` that are picked by number from a weight of three axes.

    Args:
        node: what picks them.
        weight: what reads the weight.
        index: what makes the numbers ``(picks,)``.
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

    The axes of each tensor may be in any order; those that are not named are the same in ``source`` and ``out``. No
    size depends on the data.

    Args:
        node: the product.
        source: what makes the activations.
        weight: what reads the weight, of three axes.
        order: which axes of the weight are that of matrices, of outputs and of inputs.
        source_order: all axes of the activations, that of matrices first and that of inputs last.
        out_order: all axes of the result, that of matrices first and that of outputs last.
        picked: what picks a matrix for each ``b``; None where there is one matrix for each.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    order: tuple[int, int, int]
    source_order: tuple[int, ...]
    out_order: tuple[int, ...]
    picked: Picked | None


def picked_matrices(node: fx.Node) -> Picked | None:
    """The parts of ``node`` if it picks matrices by number from a weight of three axes, and nothing else."""
    rule = find_rule(node.target) if node.op == "call_function" else None
    if rule is None or rule.values is not Values.PICKED or len(node.all_input_nodes) != 2:
        return None
    site, stated = run_alone(node)
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    if len(stated.lookups) != 1 or stated.lookups[0].index not in nodes or len(site.outs) != 1:
        return None
    index = nodes[stated.lookups[0].index]
    (weight,) = (source for source in nodes.values() if source is not index)
    w, numbers = site.of(weight), site.of(index)
    if weight.op != "get_attr" or w is None or numbers is None or (w.rank, numbers.rank, site.out.rank) != (3, 1, 3):
        return None
    if index.meta["val"].dtype not in (torch.int64, torch.int32):
        return None  # truth values pick as many as there are, and say of none which it is
    along = [i for i, axis in enumerate(w.axes) if axis == stated.lookups[0].expr]
    exprs = [stated.solver.resolve(axis) for axis in w.axes]
    found = [_only(exprs, stated.solver.resolve(axis)) for axis in site.out.axes]
    passed = [i for i in found if i is not None]
    if len(along) != 1 or sorted(passed) != [i for i in range(3) if i != along[0]]:
        return None
    return Picked(node, weight, index, found.index(None), tuple(along[0] if i is None else i for i in found))


def stacked_product(node: fx.Node) -> StackedProduct | None:
    """The parts of ``node`` if it multiplies activations by matrices of a weight of three axes, each by one of them."""
    for found in contractions(node):
        picked = picked_matrices(found.weight)
        weight = found.weight if picked is None else picked.weight
        if weight.op != "get_attr" or found.source.op == "get_attr" or found.w.rank != 3 or found.added is not None:
            continue
        axes = None if UNKNOWN_SIZE in found.x.sizes else _roles(found)
        if axes is None:
            continue
        stack, passed, source_order, out_order = axes
        order = (stack, passed, found.axis)
        if picked is not None:
            if picked.along != stack:
                continue
            order = (picked.axes[stack], picked.axes[passed], picked.axes[found.axis])
        return StackedProduct(node, found.source, weight, order, source_order, out_order, picked)
    return None


def lone_stacked_products(graph_module: fx.GraphModule) -> Iterator[StackedProduct]:
    """Yield the products, in order of execution, whose weight may be changed without anything else changing."""
    alone = lone_parameters(graph_module)
    for node in graph_module.graph.nodes:
        found = stacked_product(node)
        if found is not None and alone(found.weight, 3) and (found.picked is None or len(found.picked.node.users) == 1):
            yield found


def _roles(found: Contraction) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """The axis of matrices and that of outputs in the weight, and the axes of activations and result in order."""
    x, w, out = (found.axes(tensor) for tensor in (found.x, found.w, found.out))
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
    """Where ``wanted`` is among axes; None if it is nowhere, at several places, or of size 1."""
    places = [i for i, expr in enumerate(exprs) if expr == wanted]
    return places[0] if len(places) == 1 and wanted is not UNIT else None
