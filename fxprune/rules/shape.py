"""Ops that move axes about: reshape, transpose, expand, concatenate, cut."""

from __future__ import annotations

from torch import fx

from fxprune.axes import UNIT, Expr, concat, new_factor, product
from fxprune.errors import AxisMismatch
from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["cat", "expand", "permute", "reshape", "slice_", "split_with_sizes"]

_END = 2**63 - 1


@rule("reshape", "view", "flatten", "ravel", "reshape_as", "view_as")
def reshape(op: OpSite) -> None:
    """Row-major order is kept: runs of axes with the same number of elements hold the same units."""
    x = op.tensors[0]
    for other in op.tensors[1:]:  # the shape is that of another tensor
        op.tie_all(other)
    i = j = 0
    while i < x.rank or j < op.out.rank:
        if i < x.rank and x.sizes[i] == 1:
            i += 1
        elif j < op.out.rank and op.out.sizes[j] == 1:
            j += 1
        else:
            i, j = _match_run(op, x, i, j)
    if "shape" in op._arguments or "size" in op._arguments:
        name = "shape" if "shape" in op._arguments else "size"
        for j, axis in enumerate(op.out.axes):
            op.literal(name, axis, j)


def _match_run(op: OpSite, x: TensorAxes, i: int, j: int) -> tuple[int, int]:
    """Equate the shortest runs from ``i`` of ``x`` and ``j`` of the output that are of equal size."""
    first, second = i + 1, j + 1
    size, out_size = x.sizes[i], op.out.sizes[j]
    while size != out_size:
        if size < out_size:
            size *= x.sizes[first]
            first += 1
        else:
            out_size *= op.out.sizes[second]
            second += 1
    op.equate(product(*x.axes[i:first]), product(*op.out.axes[j:second]))
    for a in range(i, first):
        for b in range(j, second):
            op.link(x, a, op.out, b)
    return first, second


@rule("unsqueeze")
def unsqueeze(op: OpSite) -> None:
    """A new axis of size 1 at ``dim``."""
    x = op.need("self")
    at = op.arg("dim") % op.out.rank
    for i in range(x.rank):
        op.tie(x, i, op.out, i if i < at else i + 1)


@rule("squeeze", "squeeze_")
def squeeze(op: OpSite) -> None:
    """Axes of size 1 go, all or those named."""
    x = op.need("self")
    dim = op.arg("dim")
    named = range(x.rank) if dim is None else [d % x.rank for d in (dim if isinstance(dim, list | tuple) else (dim,))]
    left = [i for i in range(x.rank) if not (i in named and x.sizes[i] == 1)]
    for j, i in enumerate(left):
        op.tie(x, i, op.out, j)


@rule(
    "transpose", "t", "permute", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "matrix_H"
)
def permute(op: OpSite) -> None:
    """The axes in another order, read off the order of the strides' owners."""
    x = op.tensors[0]
    for j, i in enumerate(_order(op, x.rank)):
        op.tie(x, i, op.out, j)


def _order(op: OpSite, rank: int) -> list[int]:
    """For each output axis the input axis it is."""
    order = list(range(rank))
    if "dims" in op._arguments:
        return [i % rank for i in op.arg("dims")]
    if "dim0" in op._arguments or "axis0" in op._arguments:
        names = ("dim0", "dim1") if "dim0" in op._arguments else ("axis0", "axis1")
        a, b = (op.arg(name) % rank for name in names)
        order[a], order[b] = order[b], order[a]
        return order
    if "source" in op._arguments:
        source = [i % rank for i in _listed(op.arg("source"))]
        place = [i % rank for i in _listed(op.arg("destination"))]
        rest = iter([i for i in order if i not in source])
        return [source[place.index(j)] if j in place else next(rest) for j in range(rank)]
    return order[::-1] if "numpy_T" in str(op.node.target) else [*order[:-2], *order[-2:][::-1]]


def _listed(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@rule("expand", "expand_as", "broadcast_to", "broadcast_tensors")
def expand(op: OpSite) -> None:
    """Axes of size 1 are repeated: a fresh factor each; the others stay."""
    for out in op.outs:
        for x in op.tensors:
            op.broadcast(x, out)
    name = "size" if "size" in op._arguments else None
    sizes = op.arg(name, ()) if name else ()
    for j, size in enumerate(sizes):
        if size != -1 and name:
            op.literal(name, op.out.axes[j], j)


@rule("repeat", "tile")
def repeat(op: OpSite) -> None:
    """The whole axis, several times over: ``(times * axis)``."""
    x = op.need("self")
    name = "repeats" if "repeats" in op._arguments else "dims"
    first = op.out.rank - len(op.arg(name))
    for j in range(first):
        op.tie(x, j, op.out, j)
    for item, times in enumerate(op.arg(name)):
        j = first + item
        i = j - (op.out.rank - x.rank)
        old = x.axes[i] if i >= 0 else UNIT
        size = times if isinstance(times, int) else op.out.sizes[j] // old.size
        copies = new_factor(size)
        op.equate(product(copies, old), op.out.axes[j])
        op.literal(name, copies, item)
        if i >= 0:
            op.link(x, i, op.out, j)


@rule("repeat_interleave.self_int")
def repeat_interleave(op: OpSite) -> None:
    """Each unit several times over: ``(axis * times)``; the size of the output may be said as well."""
    x, dim = op.need("self"), op.arg("dim")
    if dim is None:
        op.freeze_all("flattens before repeating")
        return
    times = new_factor(op.arg("repeats"))
    op.tie_all(x, but=(dim,))
    op.equate(product(x.axes[dim], times), op.out.axes[dim])
    op.literal("repeats", times)
    if op.arg("output_size") is not None:
        op.literal("output_size", op.out.axes[dim])
    op.link(x, dim, op.out, dim)


@rule("cat", "concat", "concatenate")
def cat(op: OpSite) -> None:
    """One after the other along ``dim``."""
    parts = [x for x in op.list_of("tensors") if x.sizes != (0,)]
    dim = op.arg("dim", 0)
    for x in parts:
        op.tie_all(x, but=(dim,))
        op.link(x, dim, op.out, dim)
    op.equate(concat(*(x.axes[dim] for x in parts)), op.out.axes[dim])


@rule("stack")
def stack(op: OpSite) -> None:
    """One beside the other along a new axis ``dim``, whose positions are fixed."""
    at = op.arg("dim", 0) % op.out.rank
    op.freeze(op.out, at, "stacked by position")
    for x in op.list_of("tensors"):
        for i in range(x.rank):
            op.tie(x, i, op.out, i if i < at else i + 1)


@rule("split_with_sizes", "split_with_sizes_copy", "split", "chunk", "tensor_split")
def split_with_sizes(op: OpSite) -> None:
    """Cut along ``dim``: the axis is the concatenation of the parts."""
    x, dim = op.need("self"), op.arg("dim", 0)
    for part in op.outs:
        op.tie_all(x, part, but=(dim,))
        op.link(x, dim, part, dim)
    op.equate(x.axes[dim], concat(*(part.axes[dim] for part in op.outs)))
    if "split_sizes" in op._arguments:
        for j, part in enumerate(op.outs):
            op.literal("split_sizes", part.axes[dim], j)
    else:
        op.freeze(x, dim, "cut into parts of a dynamic size")


@rule("unbind")
def unbind(op: OpSite) -> None:
    """One output for each position along ``dim``, which are fixed."""
    x = op.need("self")
    at = op.arg("dim", 0) % x.rank
    op.freeze(x, at, "unbound by position")
    for part in op.outs:
        _drop_axis(op, x, at, part)


@rule("select")
def select(op: OpSite) -> None:
    """One position along ``dim``, which are fixed."""
    x = op.need("self")
    at = op.arg("dim") % x.rank
    op.freeze(x, at, "selected by position")
    _drop_axis(op, x, at, op.out)


def _drop_axis(op: OpSite, x: TensorAxes, at: int, out: TensorAxes) -> None:
    for i in range(x.rank):
        if i != at:
            op.tie(x, i, out, i if i < at else i - 1)


@rule("slice", "narrow")
def slice_(op: OpSite) -> None:
    """A run of units along ``dim``; with a step, one unit of every ``step``."""
    x, dim = op.need("self"), op.arg("dim", 0) % op.out.rank
    op.tie_all(x, but=(dim,))
    size, step = x.sizes[dim], op.arg("step", 1)
    bounds = [op.arg(name, default) for name, default in (("start", 0), ("end", _END), ("length", _END))]
    if any(isinstance(bound, fx.Node) for bound in bounds):
        _freeze_cut(op, x, dim, "cut at a position computed at run time")
        return
    start = _clamp(bounds[0], size)
    end = max(start, _clamp(start + bounds[2] if "length" in op._arguments else bounds[1], size))
    if (start, end, step) == (0, size, 1):
        op.tie(x, dim, op.out, dim)
    elif step != 1:
        _slice_step(op, x, dim, start, end, step)
    else:
        _slice_run(op, x, dim, start, end)


def _clamp(position: int, size: int) -> int:
    return min(max(position + size if position < 0 else position, 0), size)


def _freeze_cut(op: OpSite, x: TensorAxes, dim: int, reason: str) -> None:
    op.freeze(x, dim, reason)
    op.freeze(op.out, dim, reason)


def _slice_run(op: OpSite, x: TensorAxes, dim: int, start: int, end: int) -> None:
    try:
        before, rest = op.journal.solver.cut(x.axes[dim], start)
        run, _ = op.journal.solver.cut(rest, end - start)
    except AxisMismatch as error:
        _freeze_cut(op, x, dim, error.what)
        return
    op.equate(run, op.out.axes[dim])
    op.link(x, dim, op.out, dim)
    _slice_literals(op, before, run)


def _slice_literals(op: OpSite, before: Expr, run: Expr) -> None:
    """Bounds move with the units that go before them."""
    if op.arg("start", 0) != 0:
        op.literal("start", before)
    if "length" in op._arguments:
        op.literal("length", run)
    elif op.arg("end", _END) < _END:
        op.literal("end", concat(before, run))


def _slice_step(op: OpSite, x: TensorAxes, dim: int, start: int, end: int, step: int) -> None:
    size = x.sizes[dim]
    if end != size or start >= step or size % step:
        _freeze_cut(op, x, dim, "cut with a step that does not divide the axis")
        return
    inner = new_factor(step)
    op.equate(x.axes[dim], product(op.out.axes[dim], inner))
    op.journal.solver.freeze(inner, "cut with a step", op.node.name)
    op.link(x, dim, op.out, dim)


@rule("constant_pad_nd", "pad")
def pad(op: OpSite) -> None:
    """Padded axes keep their units, the others stay."""
    x = op.need("self")
    padded = sorted({x.rank - 1 - k // 2 for k, width in enumerate(op.arg("pad")) if width != 0})
    op.tie_all(x, but=padded)
    for i in padded:
        op.freeze(x, i, "padded")
        op.freeze(op.out, i, "padded")


def getitem(op: OpSite, source: tuple[TensorAxes, ...]) -> None:
    """One tensor out of the several that an op returned."""
    op.tie_all(source[int(op.node.args[1])])  # type: ignore[arg-type]
