"""Integers that are positions along an axis: what a top-k picked, on its way to where it is looked up.

When units go, those that stay have new positions. That is nothing to care about as long as positions are only moved
about, compared with each other, and used to pick from the axis that they belong to: whatever makes them runs over
the smaller axis then. Arithmetic on positions, or a comparison with a number, keeps the axis as it is.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxprune.rules.registry import Values
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes
from fxprune.rules.write import nodes_in

__all__ = ["follow_positions", "look_up", "pick"]


def pick(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> bool:
    """State that ``index`` is used along axis ``i`` of ``x``, which stays unless the positions are known as its own."""
    known = op.picks(index, x, i)
    if not known:
        op.freeze(x, i, "looked up by number")
    return known


def look_up(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> bool:
    """As :func:`pick`, for an op that returns values of ``x``: if these are positions, so are its results."""
    known = op.positions_of(x)
    if known is not None:
        op.understand(x)
        op.hold_positions(op.out, known.tensor, known.dim)
    return pick(op, index, x, i)


def follow_positions(op: OpSite, values: Values | None) -> None:
    """State what the results of an op hold: positions, or matrices picked from weights.

    Positions that the op does something else with keep all units of their axis.

    Args:
        op: the op, after its rule ran.
        values: what it does with values.
    """
    unread = [x for x in op.tensors if op.positions_of(x) is not None and x.name not in op.understood]
    if unread:
        _carry(op, unread, values)
    floats = [x for node in op.node.all_input_nodes if _is_float(node) for x in _tensors(op, node)]
    moved = op.node.target is operator.getitem or any(op.is_picked(x) for x in floats)
    if moved and floats and all(op.is_weight(x) for x in floats):
        for out in op.outs:
            op.pick_weights(out)


def _carry(op: OpSite, unread: list[TensorAxes], values: Values | None) -> None:
    """State what the results are where an op moves positions or compares them; else freeze their axis."""
    moves, compares = values in (Values.MOVED, Values.CAST), values is Values.COMPARED
    known = [found for x in (unread if compares else op.first) if (found := op.positions_of(x)) is not None]
    moved = moves and len(known) == len(op.first)
    compared = compares and len(nodes_in(op.node.args)) == len(known) == 2
    for other in known[1:] if moved or compared else ():
        op.tie(known[0].tensor, known[0].dim, other.tensor, other.dim)
    for out in op.outs if moved and known else ():
        op.hold_positions(out, known[0].tensor, known[0].dim)
    for x in unread:
        shape_only = values is Values.SHAPE or (moves and x not in op.first)
        found = op.positions_of(x)
        if found is not None and not (shape_only or compared or moved):
            op.freeze(found.tensor, found.dim, f"{op.node.target} computes with positions along this axis")


def _tensors(op: OpSite, node: fx.Node) -> list[TensorAxes]:
    """The tensor that ``node`` makes; of several, the one that is taken out."""
    if op.node.target is operator.getitem:
        return op.tensors
    found = op.of(node)
    return [] if found is None else [found]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    several = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in several)
