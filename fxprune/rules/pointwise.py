"""Ops that work on each element by itself: all axes broadcast and match."""

from __future__ import annotations

from fxprune.rules.base import OpSite
from fxprune.rules.registry import rule

__all__ = ["pointwise"]

_SAME_SHAPE = (
    "add add_ sub sub_ mul mul_ div div_ pow neg where masked_fill masked_fill_ silu gelu relu tanh sigmoid softplus"
    " to _to_copy type_as clone contiguous detach alias lift_fresh_copy dropout feature_dropout native_dropout"
    " alpha_dropout fill_ zero_ positive __and__ __or__ __xor__ bernoulli uniform_ normal_ max.other min.other"
)


@rule(*_SAME_SHAPE.split())
def pointwise(op: OpSite) -> None:
    """``out = f(x, y, ..)`` elementwise: every input broadcasts to the output."""
    for out in op.outs:
        for x in op.tensors:
            op.broadcast(x, out)


@rule("copy_", "copy")
def copy(op: OpSite) -> None:
    """``self`` takes the values of ``src``, which broadcasts to it."""
    op.tie_all(op.need("self"))
    op.broadcast(op.need("src"))
