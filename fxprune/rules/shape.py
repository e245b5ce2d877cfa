"""Ops that group axes anew, put them in another order, or repeat them."""

from __future__ import annotations

from fxprune.axes import UNIT, new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["broadcast_tensors", "expand", "permute", "repeat", "repeat_interleave", "reshape", "squeeze", "unsqueeze"]


@rule(
    *("reshape", "view", "_unsafe_view", "flatten", "ravel", "unflatten", "reshape_as", "view_as"),
    values="moved",
    may_alias=True,
    regroups=True,
)
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
    name = next((name for name in ("shape", "size", "sizes") if op.has(name)), None)
    first = op.arg("dim", 0) % x.rank if name == "sizes" else 0
    for j in range(len(op.arg(name))) if name else ():
        op.size_argument(str(name), op.out.axes[first + j], j)


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


@rule("unsqueeze", values="moved")
def unsqueeze(op: OpSite) -> None:
    """A new axis of size 1 at ``dim``."""
    x = op.need("self")
    at = op.arg("dim") % op.out.rank
    for i in range(x.rank):
        op.tie(x, i, op.out, i if i < at else i + 1)


@rule("squeeze", "squeeze_", values="moved")
def squeeze(op: OpSite) -> None:
    """Axes of size 1 go, all or those named."""
    x = op.need("self")
    dim = op.arg("dim")
    named = range(x.rank) if dim is None else [d % x.rank for d in (dim if isinstance(dim, list | tuple) else (dim,))]
    left = [i for i in range(x.rank) if not (i in named and x.sizes[i] == 1)]
    for j, i in enumerate(left):
        op.tie(x, i, op.out, j)


rule("t", notation="self[i?, j] -> out[j, i?]", values="moved")
rule("mT", "adjoint", "matrix_H", notation="self[*b, i, j] -> out[*b, j, i]", values="moved")


@rule("transpose", "permute", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims", values="moved")
def permute(op: OpSite) -> None:
    """The axes in another order, read off the order of the strides' owners."""
    x = op.tensors[0]
    for j, i in enumerate(_order(op, x.rank)):
        op.tie(x, i, op.out, j)


def _order(op: OpSite, rank: int) -> list[int]:
    """For each output axis the input axis it is."""
    order = list(range(rank))
    if op.has("dims"):
        return [i % rank for i in op.arg("dims")]
    if op.has("dim0") or op.has("axis0"):
        names = ("dim0", "dim1") if op.has("dim0") else ("axis0", "axis1")
        a, b = (op.arg(name) % rank for name in names)
        order[a], order[b] = order[b], order[a]
        return order
    if op.has("source"):
        source = [i % rank for i in _listed(op.arg("source"))]
        place = [i % rank for i in _listed(op.arg("destination"))]
        rest = iter([i for i in order if i not in source])
        return [source[place.index(j)] if j in place else next(rest) for j in range(rank)]
    return order[::-1]


def _listed(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@rule("expand", "expand_as", "broadcast_to", values="moved")
def expand(op: OpSite) -> None:
    """Axes of size 1 are repeated: a fresh factor each; the others stay."""
    for x in op.tensors:
        op.broadcast(x)
    for j, size in enumerate(op.arg("size", ())):
        if size != -1:
            op.size_argument("size", op.out.axes[j], j)


@rule("broadcast_tensors", values="moved")
def broadcast_tensors(op: OpSite) -> None:
    """As :func:`expand` for several tensors, to one shape."""
    for x, out in zip(op.list_of("tensors"), op.outs, strict=True):
        op.broadcast(x, out)
        if out is not op.out:
            op.tie_all(out)


@rule("repeat", "tile", values="moved")
def repeat(op: OpSite) -> None:
    """The whole axis, several times over: ``(times * axis)``."""
    x = op.need("self")
    name = "repeats" if op.has("repeats") else "dims"
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
        op.size_argument(name, copies, item)
        if i >= 0:
            op.link(x, i, op.out, j)


@rule("repeat_interleave.self_int", values="moved")
def repeat_interleave(op: OpSite) -> None:
    """Each unit several times over: ``(axis * times)``; the size of the output may be said as well."""
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
