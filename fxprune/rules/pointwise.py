"""Ops that work on each element by itself: all axes broadcast and match."""

from __future__ import annotations

from fxprune.axes import concat
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite

__all__ = ["glu", "pointwise", "prelu"]

_SAME_SHAPE = (
    "add add_ sub sub_ mul mul_ div div_ pow neg where masked_fill masked_fill_ silu gelu relu tanh sigmoid softplus"
    " dropout feature_dropout native_dropout"
    " alpha_dropout fill_ zero_ positive __and__ __or__ __xor__ bernoulli uniform_ normal_ max.other min.other"
    " polar complex real imag hardswish log_sigmoid special_expit special_erf floor_divide multiply divide"
    " true_divide subtract absolute negative"
)
_COMPARISONS = "eq ne lt le gt ge greater greater_equal less less_equal not_equal"

rule("type_as", "to.other", notation="self[*a] -> out[*a]", values="cast", may_alias=True)
rule("copy_", "copy", notation="self[*a], src[*a] -> out[*a]", values="pointwise")


@rule("add.Tensor", "add_.Tensor", values="pointwise", adds=True)
@rule("dropout", values="pointwise", may_alias=True)
@rule("to", "contiguous", values="cast", may_alias=True)
@rule("_to_copy", "clone", "detach", "alias", "lift_fresh_copy", values="cast")
@rule(*_COMPARISONS.split(), values="compared")
@rule(*_SAME_SHAPE.split(), values="pointwise")
def pointwise(op: OpSite) -> None:
    """``out = f(x, y, ..)`` elementwise: every input broadcasts to the output."""
    for out in op.outs:
        for x in op.tensors:
            op.broadcast(x, out)


@rule("prelu")
def prelu(op: OpSite) -> None:
    """``max(0, x) + weight * min(0, x)``, with a weight for all or one for each channel (axis 1)."""
    x, weight = op.need("self"), op.need("weight")
    op.tie_all(x)
    if weight.sizes not in ((), (1,)):
        op.tie(weight, 0, x, min(1, x.rank - 1))
    for i in range(x.rank):
        op.keep_zeros(op.out, i, (x, i))


@rule("glu")
def glu(op: OpSite) -> None:
    """``a * sigmoid(b)`` for the first and second half ``[a | b]`` of ``self`` along ``dim``."""
    x = op.need("self")
    dim = op.arg("dim", -1) % x.rank
    op.tie_all(x, but=(dim,))
    op.equate(x.axes[dim], concat(op.out.axes[dim], op.out.axes[dim]))
    op.link(x, dim, op.out, dim)
    for i in range(x.rank):
        op.keep_zeros(op.out, i, (x, i))
