"""Fused attention."""

from __future__ import annotations

from fxprune.axes import new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Role, TensorAxes

__all__ = ["scaled_dot_product_attention"]


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(op: OpSite) -> None:
    """``softmax(q k^T * scale + mask) v``: q ``(.., H, S, D)``, k ``(.., G, T, D)``, v ``(.., G, T, E)``.

    With ``enable_gqa`` query head ``g * H / G + r`` reads key head ``g``. The
    canonical form spells ``scale`` out, so that it stays that of the dense model when ``D`` shrinks.
    """
    q, k, v, mask = op.need("query"), op.need("key"), op.need("value"), op.tensor("attn_mask")
    op.tie(q, -1, k, -1)
    op.add_up((q, -1), (k, -1))
    op.tie(k, -2, v, -2)
    op.tie(q, -2, op.out, -2)
    op.tie(v, -1, op.out, -1)
    _tie_heads(op, q, k, v)
    if mask is not None:
        for i in range(1, mask.rank + 1):
            if mask.sizes[-i] != 1:
                op.tie(mask, -i, *((k, -2) if i == 1 else (q, -i)))
    op.freeze(k, -2, "attention normalises over keys")
    if op.arg("is_causal", False):
        op.freeze(q, -2, "a causal mask depends on the position")
    for i in (1, *range(3, v.rank + 1)):  # weights of attention are never zero: the values have to be
        op.keep_zeros(op.out, -i, (v, -i))
    op.tag(q, -1, Role.SUMMED)
    for x in (q, k, v):
        op.tag(x, -1, Role.HEAD_DIM)
        for i in range(3, x.rank + 1):
            op.tag(x, -i, Role.HEAD)


def _tie_heads(op: OpSite, q: TensorAxes, k: TensorAxes, v: TensorAxes) -> None:
    """Heads and batches are the same in all; several query heads may read one key head."""
    for i in range(3, q.rank + 1):
        op.tie(q, -i, op.out, -i)
        op.tie(k, -i, v, -i)
        if op.arg("enable_gqa", False) and i == 3:
            repeats = new_factor(q.sizes[-3] // k.sizes[-3])
            op.equate(q.axes[-3], product(k.axes[-3], repeats))
            op.link(q, -3, k, -3)
        elif k.sizes[-i] != 1:
            op.tie(q, -i, k, -i)
