"""Rules of gathers, scatters and routing by position.

Removing units gives the others new positions. That is harmless as long as positions are only moved around, compared
with each other, and used to index the axis that they belong to: that axis may then lose units, since the op that makes
the positions chooses among the remaining ones. Any other use of positions, such as arithmetic, freezes the axis.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxprune.graph.compat import tree_leaves
from fxprune.rules.registry import Values, rule, values_of
from fxprune.rules.site import OpSite, nodes_in
from fxprune.rules.statements import TensorAxes


def pick(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> None:
    """State that ``index`` picks along axis ``i`` of ``x``, which is frozen unless ``index`` holds its positions."""
    if not op.picks(index, x, i):
        op.freeze(x, i, "looked up by number")


def look_up(op: OpSite, index: TensorAxes, x: TensorAxes, i: int) -> None:
    """State :func:`pick` for an op that returns values of ``x``: if these are positions, so are its results."""
    known = op.positions_of(x)
    if known is not None:
        op.understand(x)
        op.hold_positions(op.out, known.tensor, known.dim)
    pick(op, index, x, i)


def follow_positions(op: OpSite) -> None:
    """State the content of results, after a rule ran: positions, or matrices picked from weights."""
    unread = [x for x in op.tensors if op.positions_of(x) is not None and x.name not in op.understood]
    if unread:
        _follow_unread(op, unread, values_of(op.node))
    taken_out = op.node.target is operator.getitem
    if not (taken_out or any(map(op.is_picked, op.tensors))):
        return
    floats: list[TensorAxes] = []
    for node in op.node.all_input_nodes:
        if any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tree_leaves(node.meta.get("val"))):
            floats += op.tensors if taken_out else [x for x in (op.of(node),) if x is not None]
    moved = taken_out or any(map(op.is_picked, floats))
    if moved and floats and all(op.is_weight(x) for x in floats):
        for out in op.outs:
            op.pick_weights(out)


def _follow_unread(op: OpSite, unread: list[TensorAxes], values: Values | None) -> None:
    """State that positions are moved or compared, if that is all that the op does; else freeze their axis."""
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


rule("embedding", notation="weight[r, w], indices[*i] -> out[*i, w]  r by indices", values="picked")


@rule("embedding_bag")
def embedding_bag(op: OpSite) -> None:
    """Sums, means or maxima of rows picked from a table; beside them, counts of rows, and for maxima their numbers."""
    weight = op.need("weight")
    pick(op, op.need("indices"), weight, 0)
    for x in op.tensors:
        if x is not weight:
            op.freeze_tensor(x, "says what is in a bag")
    for out in op.outs:
        op.freeze(out, 0, "bags of rows")
        if out.rank == 2:
            op.tie(weight, 1, out, 1)
    op.keep_zeros(op.outs[0], 1, (weight, 1))


@rule("index", values="picked")
def index(op: OpSite) -> None:
    """``self[i, j, ..]``: indexed axes are replaced by the broadcast axes of the indices, the others stay."""
    x, entries = op.need("self"), op.arg("indices")
    indexed = [i for i, entry in enumerate(entries) if isinstance(entry, fx.Node)]
    tensors = [op.of(entries[i]) for i in indexed]
    shape_rank = max((t.rank for t in tensors if t is not None), default=0)
    together = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    at = indexed[0] if together else 0
    for i, tensor in zip(indexed, tensors, strict=True):
        if tensor is not None:
            look_up(op, tensor, x, i)
            op.freeze_tensor(tensor, "chosen by index")
    op.freeze(op.out, range(at, at + shape_rank), "chosen by index")
    free = [i for i in range(x.rank) if i not in indexed]
    if op.out.rank != len(free) + shape_rank:
        op.freeze_all("a boolean mask selects")
        return
    places = [j for j in range(op.out.rank) if not at <= j < at + shape_rank]
    for i, j in zip(free, places, strict=True):
        op.tie(x, i, op.out, j)
    if op.is_weight(x) and len(free) >= 2:
        op.pick_weights(op.out)


@rule("index_select", values="picked")
def index_select(op: OpSite) -> None:
    """Units of axis ``dim``, picked by number."""
    x, index, dim = op.need("self"), op.need("index"), op.arg("dim")
    look_up(op, index, x, dim)
    op.freeze_tensor(index, "chosen by index")
    op.freeze(op.out, dim, "chosen by index")
    op.tie_all(x, but=(dim,))
    if op.is_weight(x) and x.rank >= 3:
        op.pick_weights(op.out)


@rule("tril", "triu", "tril_", "triu_", "diff", values="reduced")
def depends_on_position(op: OpSite) -> None:
    """A result that depends on the position along the last axes, which keep their units."""
    x = op.need("self")
    last = (-1,) if op.out.sizes != x.sizes else ()
    op.tie_all(x, but=last)
    for t in (x, op.out):
        op.freeze(t, range(max(-2, -t.rank), 0), f"{op.node.target} depends on the position")


@rule("topk", "sort", "argsort")
def sort(op: OpSite) -> None:
    """Values ordered along ``dim``, and positions of them, or the ``k`` largest: the result's axis is frozen.

    The axis that is sorted is frozen too; of one of which ``k`` are taken, ``k`` units must stay. Sorted positions stay
    positions.
    """
    x, k, reason = op.need("self"), op.arg("k"), f"{op.node.target} orders this axis"
    i = op.arg("dim", -1) % x.rank
    if not isinstance(k, int):
        op.freeze(x, i, reason)
    for out in op.outs:
        op.freeze(out, i, reason)
        op.tie_all(x, out, but=(i,))
    if isinstance(k, int):
        op.take_statistic(x, i)
        op.need_units(x, i, k)
        op.hold_positions(op.outs[1], x, i)
    known = op.positions_of(x) if op.name != "topk" else None
    if known is not None:
        op.understand(x)
        if len(op.outs) == 2:
            op.hold_positions(op.outs[0], known.tensor, known.dim)


@rule("gather", values="picked")
def gather(op: OpSite) -> None:
    """``out[.., j, ..] = self[.., index[.., j, ..], ..]`` along ``dim``, all three of one rank."""
    x, index = op.need("self"), op.need("index")
    dim = op.arg("dim") % x.rank
    op.tie_all(index)
    for i in range(x.rank):
        if i != dim:
            _same_or_cut(op, x, i, index)
    op.keep_all_zeros(x, but=(dim,))
    look_up(op, index, x, dim)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce")
def scatter(op: OpSite) -> None:
    """``out`` is ``self`` with ``out[.., index[.., j, ..], ..] = src[.., j, ..]`` along ``dim``."""
    x, index, source = op.need("self"), op.need("index"), op.tensor("src")
    dim = op.arg("dim") % x.rank
    op.tie_all(x)
    for i in range(x.rank):
        if i != dim:
            _same_or_cut(op, x, i, index)
        if i == dim:
            op.keep_zeros(op.out, i, (x, i))
        elif source is not None:
            op.keep_zeros(op.out, i, (x, i), (source, i))
        if source is not None:
            _same_or_cut(op, source, i, index)
    if not (op.name in ("scatter_add", "scatter_add_") or op.arg("reduce") == "sum"):
        op.freeze(index, dim, "written by number")  # writing a zero changes ``self``, adding one does not
    pick(op, index, x, dim)


def _same_or_cut(op: OpSite, x: TensorAxes, i: int, index: TensorAxes) -> None:
    """Tie axis ``i`` of ``x`` to that of ``index``; if ``index`` is shorter, freeze both."""
    if x.sizes[i] == index.sizes[i]:
        op.tie(x, i, index, i)
        return
    for tensor in (x, index):
        op.freeze(tensor, i, "looked up in part")


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_")
def index_add(op: OpSite) -> None:
    """``out`` is ``self`` with rows of ``source`` added or written at positions ``index`` along ``dim``."""
    x, index = op.need("self"), op.need("index")
    source = next((op.tensor(name) for name in ("source", "value") if op.has(name)), None)
    dim = op.arg("dim") % max(x.rank, 1)
    op.tie_all(x)
    pick(op, index, x, dim)
    if op.name not in ("index_add", "index_add_"):
        op.freeze_tensor(index, "written by number")  # writing a zero changes ``self``, adding one does not
    if source is None or source.rank == 0:
        return
    op.tie(source, dim, index, 0)
    for i in range(x.rank):
        if i != dim:
            op.tie(source, i, op.out, i)
            op.keep_zeros(op.out, i, (x, i), (source, i))


@rule("index_put", "index_put_")
def index_put(op: OpSite) -> None:
    """``out`` is ``self`` with ``values`` written at ``self[i, j, ..]``; axes without an index stay."""
    x, entries, values = op.need("self"), op.arg("indices"), op.need("values")
    op.tie_all(x)
    indexed = [i for i, entry in enumerate(entries) if isinstance(entry, fx.Node)]
    places = [op.of(entries[i]) for i in indexed]
    for i, index in zip(indexed, places, strict=True):
        if index is not None:
            pick(op, index, x, i)
            op.freeze_tensor(index, "written by number")
    free = [i for i in range(x.rank) if i not in indexed]
    trailing = bool(indexed) and free == list(range(len(indexed), x.rank))
    for j in range(1, values.rank + 1):
        if trailing and j <= len(free) and values.sizes[-j] != 1:
            op.tie(values, -j, op.out, -j)
            op.keep_zeros(op.out, -j, (x, -j), (values, -j))
        elif values.sizes[-j] != 1:
            op.freeze(values, -j, "written by number")
    for i in free if not trailing else ():
        op.freeze(x, i, "written by number")


@rule("one_hot")
def one_hot(op: OpSite) -> None:
    """A new last axis of ``num_classes``, with a one at the position in ``self``."""
    x = op.need("self")
    op.tie_all(x)
    if op.arg("num_classes", -1) != -1 and op.picks(x, op.out, -1):
        op.size_argument("num_classes", op.out.axes[-1])
        op.keep_zeros(op.out, -1)
        return
    op.freeze(op.out, -1, f"{op.node.target} numbers this axis")


@rule("histc")
def histc(op: OpSite) -> None:
    """Counts of each position in ``self``, if there is one bin for each, from ``min`` 0 to ``max`` ``bins - 1``."""
    x, bins = op.need("self"), op.arg("bins")
    op.freeze_tensor(x, f"{op.node.target} counts along this axis")
    bin_per_position = (op.arg("min", 0), op.arg("max", 0)) == (0, bins - 1)
    if bin_per_position and op.picks(x, op.out, 0):
        op.size_argument("bins", op.out.axes[0])
        op.size_argument("max", op.out.axes[0], offset=-1)
        op.keep_zeros(op.out, 0)
        return
    op.freeze(op.out, 0, f"{op.node.target} numbers this axis")
