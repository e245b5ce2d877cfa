"""Integers that point at units of an axis: what a top-k picked, on its way to where it is looked up.

When units go, those that stay have new positions. That is nothing to care about as long as positions are only moved
about, compared with each other, and used to pick from the axis that they belong to: whatever makes them runs over
the smaller axis then. Arithmetic on positions, or a comparison with a number, keeps the axis as it is.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxprune.compat import OpOverload
from fxprune.rules.base import OpSite, TensorAxes

__all__ = ["follow_pointers", "look_up", "op_name", "pick"]

_MOVE = (
    "reshape view flatten ravel reshape_as view_as unsqueeze squeeze transpose t permute numpy_T mT movedim moveaxis"
    " swapaxes swapdims expand expand_as broadcast_to repeat tile cat concat concatenate stack split_with_sizes split"
    " chunk tensor_split unbind getitem select slice narrow flip roll to _to_copy type_as clone contiguous detach alias"
    " lift_fresh lift_fresh_copy"
)
"""Ops whose results hold the same positions as their inputs."""

_COMPARE = "eq ne lt le gt ge"
"""Ops that give the same answer for the new positions of two units as for the old ones."""

_LOOK = (
    "sym_size sym_stride sym_numel zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones"
    " new_empty new_full"
)
"""Ops that look at the shape alone."""

_MOVES, _COMPARISONS, _LOOKS = (frozenset(names.split()) for names in (_MOVE, _COMPARE, _LOOK))


def pick(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> bool:
    """``index`` is used along axis ``i`` of ``x``, which keeps its units unless the positions are known as its own."""
    known = op.picks(index, x, i)
    if not known:
        op.freeze(x, i, "looked up by number")
    return known


def look_up(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> bool:
    """As :func:`pick`, for an op that returns values of ``x``: if these are positions, so are its results."""
    target = op.journal.pointers.get(x.name)
    if target is not None:
        op.understood.add(x.name)
        op.point_at(op.out, *target)
    return pick(op, index, x, i)


def follow_pointers(site: OpSite) -> None:
    """What holds positions, and what holds matrices picked from weights, is known for the results of an op.

    Positions that the op does something else with keep all units of their axis.
    """
    pointers, picked = site.journal.pointers, site.journal.picked
    inputs = [(node, x) for node in site.node.all_input_nodes for x in _tensors(site, node)]
    unread = [x for _, x in inputs if x.name in pointers and x.name not in site.understood]
    if unread:
        _carry(site, unread)
    values = [x for node, x in inputs if _is_float(node.meta.get("val"))]
    moved = site.node.target is operator.getitem or any(x.name in picked for x in values)
    if moved and values and all(site.is_weight(x) for x in values):
        picked.update(out.name for out in site.outs)


def _tensors(site: OpSite, node: fx.Node) -> list[TensorAxes]:
    """The tensor that ``node`` makes; of several, the one that ``getitem`` takes."""
    found = site.journal.tensors.get(str(node.target) if node.op == "get_attr" else node.name)
    if isinstance(found, tuple):
        return [found[int(site.node.args[1])]] if site.node.target is operator.getitem else []  # type: ignore[arg-type]
    return [] if found is None else [found]


def _carry(site: OpSite, unread: list[TensorAxes]) -> None:
    """Say what the results are where an op moves positions or compares them; else freeze the axis they belong to."""
    name, pointers = op_name(site.node), site.journal.pointers
    first = [x for node in _nodes(site.node.args[:1]) for x in _tensors(site, node)]
    values = unread if name in _COMPARISONS else first
    targets = [pointers[x.name] for x in values if x.name in pointers]
    moved = name in _MOVES and len(targets) == len(first)
    compared = name in _COMPARISONS and len(_nodes(site.node.args)) == len(targets) == 2
    for target in targets[1:] if moved or compared else ():
        site.tie(*targets[0], *target)
    for out in site.outs if moved and targets else ():
        site.point_at(out, *targets[0])
    for x in unread:
        shape_only = name in _LOOKS or (name.endswith("_as") and x not in first)
        if not (shape_only or compared or (moved and x in first)):
            site.freeze(*pointers[x.name], f"{site.node.target} computes with positions along this axis")


def _nodes(args: object) -> list[fx.Node]:
    """The nodes in ``args`` and in lists there."""
    if isinstance(args, tuple | list):
        return [node for arg in args for node in _nodes(arg)]
    return [args] if isinstance(args, fx.Node) else []


def _is_float(value: object) -> bool:
    several = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in several)


def op_name(node: fx.Node) -> str:
    """The op of ``node`` without namespace and overload."""
    if isinstance(node.target, OpOverload):
        return str(node.target.name()).removeprefix("aten::").partition(".")[0]
    return str(getattr(node.target, "__name__", node.target))
