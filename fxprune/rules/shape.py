"""Rules of reshapes, permutations, concatenations, slices and diagonals."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from fxprune.axes import UNIT, concat, new_factor, product
from fxprune.errors import AxisMismatch
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes


@rule(
    *("reshape", "view", "_unsafe_view", "flatten", "ravel", "unflatten", "reshape_as", "view_as"),
    values="moved",
    may_alias=True,
    regroups=True,
)
def reshape(op: OpSite) -> None:
    """Row-major order is kept: runs of axes with equal numbers of elements hold the same units."""
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
            start, out_start, size, out_size = i, j, x.sizes[i], op.out.sizes[j]
            i, j = i + 1, j + 1
            while size != out_size:  # the shortest runs of equal size
                if size < out_size:
                    size, i = size * x.sizes[i], i + 1
                else:
                    out_size, j = out_size * op.out.sizes[j], j + 1
            op.equate(product(*x.axes[start:i]), product(*op.out.axes[out_start:j]))
            for a, b in itertools.product(range(start, i), range(out_start, j)):
                op.link(x, a, op.out, b)
    name = next((name for name in ("shape", "size", "sizes") if op.has(name)), None)
    first = op.arg("dim", 0) % x.rank if name == "sizes" else 0
    for j in range(len(op.arg(name))) if name else ():
        op.size_argument(str(name), op.out.axes[first + j], j)


@rule("unsqueeze", "stack", values="moved")
def unsqueeze(op: OpSite) -> None:
    """A new axis at ``dim``: of size 1, or frozen if tensors are stacked along it."""
    at = op.arg("dim", 0) % op.out.rank
    assert op.tensors, f"{op.node.name} has no tensor"
    if op.name == "stack":
        op.freeze(op.out, at, "stacked by position")
    for x in op.tensors:
        for i in range(x.rank):
            op.tie(x, i, op.out, i if i < at else i + 1)


@rule("squeeze", "squeeze_", values="moved")
def squeeze(op: OpSite) -> None:
    """Axes of size 1 are dropped: all, or those named."""
    x = op.need("self")
    dim = op.arg("dim")
    named = range(x.rank) if dim is None else [d % x.rank for d in (dim if isinstance(dim, list | tuple) else (dim,))]
    op.tie_others(x, [i for i in named if x.sizes[i] == 1])


rule("t", notation="self[i?, j] -> out[j, i?]", values="moved")
rule("mT", "adjoint", "matrix_H", notation="self[*b, i, j] -> out[*b, j, i]", values="moved")


@rule("transpose", "permute", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims", values="moved")
def permute(op: OpSite) -> None:
    """The axes in another order, found by permuting a tensor in which each axis has its number as its stride."""
    x = op.tensors[0]
    numbered = torch.empty_strided([1] * x.rank, tuple(range(x.rank)), device="meta")
    permuted = op.node.target(numbered, *op.node.args[1:], **op.node.kwargs)  # type: ignore[operator]
    for j, i in enumerate(permuted.stride()):
        op.tie(x, i, op.out, j)


@rule("expand", "expand_as", "broadcast_to", values="moved")
def expand(op: OpSite) -> None:
    """Axes of size 1 are repeated, each as a fresh factor; the others stay."""
    for x in op.tensors:
        op.broadcast(x)
    for j, size in enumerate(op.arg("size", ())):
        if size != -1:
            op.size_argument("size", op.out.axes[j], j)


@rule("broadcast_tensors", values="moved")
def broadcast_tensors(op: OpSite) -> None:
    """Several tensors expanded to one shape."""
    for x, out in zip(op.list_of("tensors"), op.outs, strict=True):
        op.broadcast(x, out)
        if out is not op.out:
            op.tie_all(out)


@rule("repeat", "tile", values="moved")
def repeat(op: OpSite) -> None:
    """The whole axis repeated: ``(times * axis)``."""
    x = op.need("self")
    name = "repeats" if op.has("repeats") else "dims"
    first, new = op.out.rank - len(op.arg(name)), op.out.rank - x.rank
    for j in range(first):
        op.tie(x, j, op.out, j)
    for j, times in enumerate(op.arg(name), first):
        old = x.axes[j - new] if j >= new else UNIT
        copies = new_factor(times if isinstance(times, int) else op.out.sizes[j] // old.size)
        op.equate(product(copies, old), op.out.axes[j])
        op.size_argument(name, copies, j - first)
        if j >= new:
            op.link(x, j - new, op.out, j)


@rule("repeat_interleave.self_int", values="moved")
def repeat_interleave(op: OpSite) -> None:
    """Each unit repeated: ``(axis * times)``; the op may also take the size of the output."""
    x, dim = op.need("self"), op.arg("dim")
    if dim is None:
        op.freeze_all("flattens before repeating")
        return
    times = new_factor(op.arg("repeats"))
    op.tie_all(x, but=(dim,))
    op.equate(product(x.axes[dim], times), op.out.axes[dim])
    op.size_argument("repeats", times)
    if op.arg("output_size") is not None:
        op.size_argument("output_size", op.out.axes[dim])
    op.link(x, dim, op.out, dim)


_END = 2**63 - 1
"""Torch's number for the end of an axis in a slice."""


@rule("cat", "concat", "concatenate", values="moved")
def cat(op: OpSite) -> None:
    """Tensors concatenated along ``dim``."""
    parts = [x for x in op.list_of("tensors") if x.sizes != (0,)]
    dim = op.arg("dim", 0)
    for x in parts:
        op.tie_all(x, but=(dim,))
        op.link(x, dim, op.out, dim)
    op.equate(concat(*(x.axes[dim] for x in parts)), op.out.axes[dim])


@rule("split_with_sizes", "split_with_sizes_copy", "split", "chunk", "tensor_split", values="moved")
def split_with_sizes(op: OpSite) -> None:
    """Parts along ``dim``, whose concatenation is the axis."""
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


@rule("unbind", "select", values="moved")
def select(op: OpSite) -> None:
    """One position along ``dim``, or an output for each position; that axis is frozen."""
    x = op.need("self")
    at = op.arg("dim", 0) % x.rank
    op.freeze(x, at, f"{'unbound' if op.name == 'unbind' else 'selected'} by position")
    op.tie_others(x, (at,))


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
    elif step == 1:
        _slice_run(op, x, dim, start, end)
    elif end != size or start >= step or size % step:
        _freeze_cut(op, x, dim, "cut with a step that does not divide the axis")
    else:
        inner = new_factor(step)
        op.equate(x.axes[dim], product(op.out.axes[dim], inner))
        op.freeze_expr(inner, "cut with a step")
        op.link(x, dim, op.out, dim)


def _clamp(position: int, size: int) -> int:
    return min(max(position + size if position < 0 else position, 0), size)


def _freeze_cut(op: OpSite, x: TensorAxes, dim: int, reason: str) -> None:
    for tensor in (x, op.out):
        op.freeze(tensor, dim, reason)


def _slice_run(op: OpSite, x: TensorAxes, dim: int, start: int, end: int) -> None:
    try:
        before, rest = op.cut(x.axes[dim], start)
        run, _ = op.cut(rest, end - start)
    except AxisMismatch as error:
        _freeze_cut(op, x, dim, error.what)
        return
    op.equate(run, op.out.axes[dim])
    op.link(x, dim, op.out, dim)
    if op.arg("start", 0) != 0:  # bounds move with the units that are removed before them
        op.size_argument("start", before)
    if op.has("length"):
        op.size_argument("length", run)
    elif op.arg("end", _END) < _END:
        op.size_argument("end", concat(before, run))


@rule("constant_pad_nd", "pad")
def pad(op: OpSite) -> None:
    """Padded axes keep their units, the others stay."""
    x = op.need("self")
    padded = sorted({x.rank - 1 - k // 2 for k, width in enumerate(op.arg("pad")) if width != 0})
    op.tie_all(x, but=padded)
    for i in range(x.rank):
        op.keep_values(op.out, i, (x, i), float(op.arg("value", 0)))
    for tensor in (x, op.out):
        op.freeze(tensor, padded, "padded")


@rule("python::getitem", values="moved")
def getitem(op: OpSite) -> None:
    """One of the several tensors that an op returned."""
    for x in op.tensors if op.outs else ():
        op.tie_all(x)


_REASON = "read along a diagonal beside the main one"


def _tie_diagonal(op: OpSite, x: TensorAxes, y: TensorAxes, first: int, second: int) -> None:
    """Tie axes ``first`` and ``second`` of ``x`` to the last of ``y``; freeze them beside the main diagonal."""
    if op.arg("offset", 0) == 0 and x.sizes[first] == x.sizes[second] == y.sizes[-1]:
        op.tie(x, first, y, -1)
        op.tie(x, second, y, -1)
    else:
        op.freeze(x, (first, second), _REASON)
        op.freeze(y, -1, _REASON)


@rule("diagonal", "diagonal_copy", values="moved")
def diagonal(op: OpSite) -> None:
    """The diagonal of ``dim1`` and ``dim2`` as a new last axis; the others stay."""
    x = op.need("self")
    first, second = (op.arg(name, default) % x.rank for name, default in (("dim1", 0), ("dim2", 1)))
    _tie_diagonal(op, x, op.out, first, second)
    op.tie_others(x, (first, second))


@rule("diag_embed")
def diag_embed(op: OpSite) -> None:
    """The last axis as the diagonal of ``dim1`` and ``dim2``, with zeros beside it; the others stay."""
    x, rank = op.need("self"), op.out.rank
    first, second = (op.arg(name, default) % rank for name, default in (("dim1", -2), ("dim2", -1)))
    _tie_diagonal(op, op.out, x, first, second)
    rest = [j for j in range(rank) if j not in (first, second)]
    for i, j in enumerate(rest):
        op.tie(x, i, op.out, j)
    for i, j in (*enumerate(rest), (-1, first), (-1, second)):
        op.keep_values(op.out, j, (x, i), 0.0)


@rule("trace", values="reduced")
def diagonal_sum(op: OpSite) -> None:
    """The sum of the diagonal: units that are zero along one of the axes can be removed."""
    x = op.need("self")
    if x.sizes[0] != x.sizes[1]:
        op.freeze_tensor(x, _REASON)
        return
    op.tie(x, 0, x, 1)
    op.add_up((x, 0), (x, 1))


@rule("block_diag", values="reduced")
def block_diag(op: OpSite) -> None:
    """Matrices along a diagonal, with zeros beside them: rows are concatenated, and columns."""
    blocks = op.list_of("tensors")
    if any(x.rank != 2 for x in blocks):
        op.freeze_all("a block without two axes")
        return
    for i in (0, 1):
        op.equate(concat(*(x.axes[i] for x in blocks)), op.out.axes[i])
        for x in blocks:
            op.link(x, i, op.out, i)
