"""Ops that take one value out of an axis, or order it."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["order", "reduce", "scan"]


def _dims(op: OpSite, x: TensorAxes) -> tuple[int, ...]:
    """The axes reduced over, non-negative; all where none is named."""
    dim = op.arg("dim")
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return tuple(range(x.rank))
    return tuple(i % max(x.rank, 1) for i in (dim if isinstance(dim, Sequence) else (dim,)))


@rule(
    "mean",
    "sum",
    "var",
    "std",
    "amax",
    "amin",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "var_mean",
    "std_mean",
)
def reduce(op: OpSite) -> None:
    """A statistic over ``dim``: removing units of it changes the statistic; the other axes stay."""
    x = op.need("x" if "x" in op._arguments else "self")
    dims = _dims(op, x)
    for i in dims:
        op.renormalise(x, i)
    _keep_others(op, x, dims)


@rule("prod", "argmax", "argmin", "max.dim", "min.dim", "max", "min", "any", "all", "median", "mode", "kthvalue")
def order(op: OpSite) -> None:
    """A value picked by comparison or product over ``dim``: its units are not free to go."""
    x = op.need("self")
    dims = _dims(op, x)
    for i in dims:
        op.freeze(x, i, f"{op.node.target} picks from this axis")
    _keep_others(op, x, dims)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "roll")
def scan(op: OpSite) -> None:
    """Each value depends on all, or on those before it, along ``dim``: that axis keeps its units."""
    x = op.need("self")
    op.tie_all(x)
    listed = tuple(i % x.rank for i in op.arg("dims", ())) or tuple(range(x.rank))  # a roll of none rolls all
    dims = _dims(op, x) if "dim" in op._arguments else listed
    for i in dims:
        op.freeze(x, i, f"{op.node.target} runs over this axis")


@rule("topk", "sort", "argsort")
def sort(op: OpSite) -> None:
    """Values ordered along ``dim``: the result's axis is a position of its own."""
    x = op.need("self")
    i = op.arg("dim", -1) % x.rank
    op.freeze(x, i, f"{op.node.target} orders this axis")
    for out in op.outs:
        op.freeze(out, i, f"{op.node.target} orders this axis")
        op.tie_all(x, out, but=(i,))


def _keep_others(op: OpSite, x: TensorAxes, dims: tuple[int, ...]) -> None:
    """The axes that are not reduced are those of every output."""
    left = [i for i in range(x.rank) if i not in dims]
    for out in op.outs:
        for j, i in enumerate(left):
            op.tie(x, i, out, i if out.rank == x.rank else j)
