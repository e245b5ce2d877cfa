"""Ops that route: pick units by comparison, look up or write at positions, count them.

Where it is known which axis an integer tensor holds positions along, that axis may lose units: what picks runs over
those that are left, and what is looked up at the positions has lost the same ones.
"""

from __future__ import annotations

from torch import fx

from fxprune.rules.positions import look_up, pick
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["gather", "histc", "index_add", "index_put", "one_hot", "scatter", "sort", "topk"]


@rule("topk")
def topk(op: OpSite) -> None:
    """The ``k`` largest along ``dim``, and where they are: ``k`` units have to be left; the result's axis is fixed."""
    x, k = op.need("self"), op.arg("k")
    i = op.arg("dim", -1) % x.rank
    _order(op, x, i)
    if not isinstance(k, int):
        op.freeze(x, i, f"{op.node.target} orders this axis")
        return
    op.take_statistic(x, i)
    op.need_units(x, i, k)
    op.hold_positions(op.outs[1], x, i)


@rule("sort", "argsort")
def sort(op: OpSite) -> None:
    """Values ordered along ``dim``: the result's axis is a position of its own. Positions stay positions."""
    x = op.need("self")
    i = op.arg("dim", -1) % x.rank
    op.freeze(x, i, f"{op.node.target} orders this axis")
    _order(op, x, i)
    known = op.positions_of(x)
    if known is not None:
        op.understand(x)
        if len(op.outs) == 2:
            op.hold_positions(op.outs[0], known.tensor, known.dim)


def _order(op: OpSite, x: TensorAxes, i: int) -> None:
    for out in op.outs:
        op.freeze(out, i, f"{op.node.target} orders this axis")
        op.tie_all(x, out, but=(i,))


@rule("gather", values="picked")
def gather(op: OpSite) -> None:
    """``out[.., j, ..] = self[.., index[.., j, ..], ..]`` along ``dim``, all three of one rank."""
    x, index = op.need("self"), op.need("index")
    dim = op.arg("dim") % x.rank
    op.tie_all(index)
    for i in range(x.rank):
        if i != dim:
            _same_or_cut(op, x, i, index)
            op.keep_zeros(op.out, i, (x, i))
    look_up(op, index, x, dim)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce")
def scatter(op: OpSite) -> None:
    """``out`` is ``self``, but for ``out[.., index[.., j, ..], ..]``, which gets ``src[.., j, ..]``, along ``dim``."""
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
        op.freeze(index, dim, "written by number")  # a zero that is written is not nothing; one that is added is
    pick(op, index, x, dim)


def _same_or_cut(op: OpSite, x: TensorAxes, i: int, index: TensorAxes) -> None:
    """Axis ``i`` of ``x`` is that of ``index``, which may be shorter: then both keep their units."""
    if x.sizes[i] == index.sizes[i]:
        op.tie(x, i, index, i)
        return
    for tensor in (x, index):
        op.freeze(tensor, i, "looked up in part")


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_")
def index_add(op: OpSite) -> None:
    """``out`` is ``self`` with rows of ``source`` added, or put, at positions ``index`` along ``dim``."""
    x, index = op.need("self"), op.need("index")
    source = next((op.tensor(name) for name in ("source", "value") if op.has(name)), None)
    dim = op.arg("dim") % max(x.rank, 1)
    op.tie_all(x)
    pick(op, index, x, dim)
    if op.name not in ("index_add", "index_add_"):
        op.freeze_tensor(index, "written by number")  # a zero that is written is not nothing; one that is added is
    if source is None or source.rank == 0:
        return
    op.tie(source, dim, index, 0)
    for i in range(x.rank):
        if i != dim:
            op.tie(source, i, op.out, i)
            op.keep_zeros(op.out, i, (x, i), (source, i))


@rule("index_put", "index_put_")
def index_put(op: OpSite) -> None:
    """``out`` is ``self`` with ``values`` at ``self[i, j, ..]``; axes without an index stay."""
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
    """A new last axis of ``num_classes``, with a one at the position that ``self`` holds."""
    x = op.need("self")
    for i in range(x.rank):
        op.tie(x, i, op.out, i)
    if op.arg("num_classes", -1) != -1 and op.picks(x, op.out, -1):
        op.size_argument("num_classes", op.out.axes[-1])
        op.keep_zeros(op.out, -1)
        return
    op.freeze(op.out, -1, f"{op.node.target} numbers this axis")


@rule("histc")
def histc(op: OpSite) -> None:
    """How often each position in ``self`` occurs: a bin for each, from ``min`` 0 to ``max`` ``bins - 1``."""
    x, bins = op.need("self"), op.arg("bins")
    op.freeze_tensor(x, f"{op.node.target} counts along this axis")
    each_its_own = (op.arg("min", 0), op.arg("max", 0)) == (0, bins - 1)
    if each_its_own and op.picks(x, op.out, 0):
        op.size_argument("bins", op.out.axes[0])
        op.size_argument("max", op.out.axes[0], offset=-1)
        op.keep_zeros(op.out, 0)
        return
    op.freeze(op.out, 0, f"{op.node.target} numbers this axis")
