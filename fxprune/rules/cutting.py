"""Ops that join axes end to end, cut them, or take a place out of them."""

from __future__ import annotations

from torch import fx

from fxprune.axes import Expr, concat, new_factor, product
from fxprune.errors import AxisMismatch
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["cat", "getitem", "pad", "select", "slice_", "split_with_sizes", "stack", "unbind"]

_END = 2**63 - 1
"""How torch spells the end of an axis in a slice."""


@rule("cat", "concat", "concatenate", values="moved")
def cat(op: OpSite) -> None:
    """One after the other along ``dim``."""
    parts = [x for x in op.list_of("tensors") if x.sizes != (0,)]
    dim = op.arg("dim", 0)
    for x in parts:
        op.tie_all(x, but=(dim,))
        op.link(x, dim, op.out, dim)
    op.equate(concat(*(x.axes[dim] for x in parts)), op.out.axes[dim])


@rule("stack", values="moved")
def stack(op: OpSite) -> None:
    """One beside the other along a new axis ``dim``, whose positions are fixed."""
    at = op.arg("dim", 0) % op.out.rank
    op.freeze(op.out, at, "stacked by position")
    for x in op.list_of("tensors"):
        for i in range(x.rank):
            op.tie(x, i, op.out, i if i < at else i + 1)


@rule("split_with_sizes", "split_with_sizes_copy", "split", "chunk", "tensor_split", values="moved")
def split_with_sizes(op: OpSite) -> None:
    """Cut along ``dim``: the axis is the concatenation of the parts."""
    x, dim = op.need("self"), op.arg("dim", 0)
    for part in op.outs:
        op.tie_all(x, part, but=(dim,))
        op.link(x, dim, part, dim)
    op.equate(x.axes[dim], concat(*(part.axes[dim] for part in op.outs)))
    if op.has("split_sizes"):
        for j, part in enumerate(op.outs):
            op.size_argument("split_sizes", part.axes[dim], j)
    else:
        op.freeze(x, dim, "cut into parts of a dynamic size")


@rule("unbind", values="moved")
def unbind(op: OpSite) -> None:
    """One output for each position along ``dim``, which are fixed."""
    x = op.need("self")
    at = op.arg("dim", 0) % x.rank
    op.freeze(x, at, "unbound by position")
    for part in op.outs:
        _drop_axis(op, x, at, part)


@rule("select", values="moved")
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


@rule("slice", "narrow", values="moved")
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
    end = max(start, _clamp(start + bounds[2] if op.has("length") else bounds[1], size))
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
        before, rest = op.cut(x.axes[dim], start)
        run, _ = op.cut(rest, end - start)
    except AxisMismatch as error:
        _freeze_cut(op, x, dim, error.what)
        return
    op.equate(run, op.out.axes[dim])
    op.link(x, dim, op.out, dim)
    _slice_sizes(op, before, run)


def _slice_sizes(op: OpSite, before: Expr, run: Expr) -> None:
    """Bounds move with the units that go before them."""
    if op.arg("start", 0) != 0:
        op.size_argument("start", before)
    if op.has("length"):
        op.size_argument("length", run)
    elif op.arg("end", _END) < _END:
        op.size_argument("end", concat(before, run))


def _slice_step(op: OpSite, x: TensorAxes, dim: int, start: int, end: int, step: int) -> None:
    size = x.sizes[dim]
    if end != size or start >= step or size % step:
        _freeze_cut(op, x, dim, "cut with a step that does not divide the axis")
        return
    inner = new_factor(step)
    op.equate(x.axes[dim], product(op.out.axes[dim], inner))
    op.freeze_expr(inner, "cut with a step")
    op.link(x, dim, op.out, dim)


@rule("constant_pad_nd", "pad")
def pad(op: OpSite) -> None:
    """Padded axes keep their units, the others stay."""
    x = op.need("self")
    padded = sorted({x.rank - 1 - k // 2 for k, width in enumerate(op.arg("pad")) if width != 0})
    op.tie_all(x, but=padded)
    for i in range(x.rank):
        op.keep_values(op.out, i, (x, i), float(op.arg("value", 0)))
    for i in padded:
        op.freeze(x, i, "padded")
        op.freeze(op.out, i, "padded")


@rule("python::getitem", values="moved")
def getitem(op: OpSite) -> None:
    """One tensor out of the several that an op returned."""
    for x in op.tensors if op.outs else ():
        op.tie_all(x)
