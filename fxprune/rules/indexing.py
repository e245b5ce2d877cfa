"""Ops that look values up by index: what is indexed keeps its units, unless the index holds positions along it."""

from __future__ import annotations

from torch import fx

from fxprune.rules.positions import look_up
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite

__all__ = ["depends_on_position", "index", "index_select"]

rule("embedding", notation="weight[r, w], indices[*i] -> out[*i, w]  r by indices", values="picked")


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
        op.pick_weights(op.out)


@rule("index_select", values="picked")
def index_select(op: OpSite) -> None:
    """Units of axis ``dim`` picked by number."""
    x, index, dim = op.need("self"), op.need("index"), op.arg("dim")
    look_up(op, index, x, dim)
    op.freeze_tensor(index, "chosen by index")
    op.freeze(op.out, dim, "chosen by index")
    op.tie_all(x, but=(dim,))
    if op.is_weight(x) and x.rank >= 3:
        op.pick_weights(op.out)


@rule("tril", "triu", "tril_", "triu_", "diff", values="reduced")
def depends_on_position(op: OpSite) -> None:
    """Depends on the position along the last axes, which keep their units."""
    x = op.need("self")
    last = (-1,) if op.out.sizes != x.sizes else ()
    op.tie_all(x, but=last)
    for t in (x, op.out):
        for i in range(max(-2, -t.rank), 0):
            op.freeze(t, i, f"{op.node.target} depends on the position")
