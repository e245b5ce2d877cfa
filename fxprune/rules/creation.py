"""Ops that make tensors: constant ones shrink with what they meet, numbered ones do not."""

from __future__ import annotations

from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite

__all__ = ["constant", "numbered", "zeros", "zeros_like"]

rule(
    *("ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    notation="self[*a] -> out[*a]",
    values="shape",
)
rule("lift_fresh", notation="self[*a] -> out[*a]", values="moved")
rule("scalar_tensor", notation="-> out[]")
rule("sym_size", "sym_stride", "sym_numel", notation="self[*a] -> ", values="shape")


@rule("full", "ones", "empty", "new_full", "new_ones", "new_empty", values="shape")
def constant(op: OpSite) -> None:
    """The same value everywhere: each axis takes the size of whatever it is used with."""
    for i, axis in enumerate(op.out.axes):
        op.size_argument("size", axis, i)


@rule("zeros", "new_zeros", values="shape")
def zeros(op: OpSite) -> None:
    """As :func:`constant`, and zero for every unit."""
    constant(op)
    for i in range(op.out.rank):
        op.keep_zeros(op.out, i)


@rule("zeros_like", values="shape")
def zeros_like(op: OpSite) -> None:
    """The axes of ``self``, and zero for every unit."""
    op.tie_all(op.need("self"))
    for i in range(op.out.rank):
        op.keep_zeros(op.out, i)


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm")
def numbered(op: OpSite) -> None:
    """Values that depend on their position: every unit has to stay."""
    for i in range(op.out.rank):
        op.freeze(op.out, i, f"{op.node.target} numbers this axis")
