"""Ops that look values up by index: what is indexed keeps its units, unless the index holds positions along it."""

from __future__ import annotations

from torch import fx

from fxprune.rules.base import OpSite
from fxprune.rules.pointers import look_up
from fxprune.rules.registry import rule

__all__ = ["embedding", "index", "index_select"]


@rule("embedding")
def embedding(op: OpSite) -> None:
    """Row ``indices[..]`` of ``weight (rows, width)``: ``out (.., width)``."""
    weight, indices = op.need("weight"), op.need("indices")
    if not op.picks(indices, weight, 0):
        op.freeze(weight, 0, "rows are looked up by number")
    op.tie(weight, 1, op.out, -1)
    op.tie_all(indices)


@rule("index")
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
    for i in range(at, at + shape_rank):
        op.freeze(op.out, i, "chosen by index")
    free = [i for i in range(x.rank) if i not in indexed]
    if op.out.rank != len(free) + shape_rank:
        op.freeze_all("a boolean mask selects")
        return
    places = [j for j in range(op.out.rank) if not at <= j < at + shape_rank]
    for i, j in zip(free, places, strict=True):
        op.tie(x, i, op.out, j)
    if op.is_weight(x) and len(free) >= 2:
        op.journal.picked.add(op.out.name)


@rule("index_select")
def index_select(op: OpSite) -> None:
    """Units of axis ``dim`` picked by number."""
    x, dim = op.need("self"), op.arg("dim")
    look_up(op, op.need("index"), x, dim)
    op.freeze(op.out, dim, "chosen by index")
    op.tie_all(x, but=(dim,))
    if op.is_weight(x) and x.rank >= 3:
        op.journal.picked.add(op.out.name)


@rule("tril", "triu", "tril_", "triu_", "diff")
def positional(op: OpSite) -> None:
    """Depends on the position along the last axes, which keep their units."""
    x = op.need("self")
    last = (-1,) if op.out.sizes != x.sizes else ()
    op.tie_all(x, but=last)
    for t in (x, op.out):
        for i in range(max(-2, -t.rank), 0):
            op.freeze(t, i, f"{op.node.target} depends on the position")
