"""Ops that read a diagonal, or put one into zeros: both of its axes hold the same units."""

from __future__ import annotations

from fxprune.axes import concat
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["block_diag", "diag_embed", "diagonal", "trace"]

_REASON = "read along a diagonal beside the main one"


def _same(op: OpSite, x: TensorAxes, y: TensorAxes, first: int, second: int) -> None:
    """Axes ``first`` and ``second`` of ``x`` are the last one of ``y``, if it is the main diagonal of a square."""
    square = op.arg("offset", 0) == 0 and x.sizes[first] == x.sizes[second] == y.sizes[-1]
    for i in (first, second):
        if square:
            op.tie(x, i, y, -1)
        else:
            op.freeze(x, i, _REASON)
    if not square:
        op.freeze(y, -1, _REASON)


@rule("diagonal", "diagonal_copy", values="moved")
def diagonal(op: OpSite) -> None:
    """What lies on the diagonal of ``dim1`` and ``dim2`` is a new last axis; the others stay."""
    x = op.need("self")
    first, second = (op.arg(name, default) % x.rank for name, default in (("dim1", 0), ("dim2", 1)))
    _same(op, x, op.out, first, second)
    for j, i in enumerate(i for i in range(x.rank) if i not in (first, second)):
        op.tie(x, i, op.out, j)


@rule("diag_embed")
def diag_embed(op: OpSite) -> None:
    """The last axis is the diagonal of ``dim1`` and ``dim2``, with zeros beside it; the others stay."""
    x, rank = op.need("self"), op.out.rank
    first, second = (op.arg(name, default) % rank for name, default in (("dim1", -2), ("dim2", -1)))
    _same(op, op.out, x, first, second)
    rest = [j for j in range(rank) if j not in (first, second)]
    for i, j in enumerate(rest):
        op.tie(x, i, op.out, j)
    for i, j in (*enumerate(rest), (-1, first), (-1, second)):
        op.keep_values(op.out, j, (x, i), 0.0)


@rule("trace", values="reduced")
def trace(op: OpSite) -> None:
    """The sum of the diagonal: units that are zero along one of the axes can go."""
    x = op.need("self")
    if x.sizes[0] != x.sizes[1]:
        op.freeze_tensor(x, _REASON)
        return
    op.tie(x, 0, x, 1)
    op.add_up((x, 0), (x, 1))


@rule("block_diag", values="reduced")
def block_diag(op: OpSite) -> None:
    """Matrices along a diagonal, with zeros beside them: rows one after the other, and columns."""
    blocks = op.list_of("tensors")
    if any(x.rank != 2 for x in blocks):
        op.freeze_all("a block that is no matrix")
        return
    for i in (0, 1):
        op.equate(concat(*(x.axes[i] for x in blocks)), op.out.axes[i])
        for x in blocks:
            op.link(x, i, op.out, i)
