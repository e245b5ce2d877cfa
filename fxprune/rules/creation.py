"""Ops that make tensors: constant ones shrink with what they meet, numbered ones do not."""

from __future__ import annotations

from fxprune.rules.base import OpSite
from fxprune.rules.registry import rule

__all__ = ["constant", "like", "numbered"]


@rule("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty")
def constant(op: OpSite) -> None:
    """The same value everywhere: each axis takes the size of whatever it is used with."""
    for i, axis in enumerate(op.out.axes):
        op.literal("size", axis, i)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(op: OpSite) -> None:
    """The axes of ``self``."""
    op.tie_all(op.need("self"))


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm")
def numbered(op: OpSite) -> None:
    """Values that depend on their position: every unit has to stay."""
    for i in range(op.out.rank):
        op.freeze(op.out, i, f"{op.node.target} numbers this axis")


@rule("scalar_tensor", "lift_fresh")
def scalar(op: OpSite) -> None:
    """No axes, or those of the input."""
    for x in op.tensors:
        op.tie_all(x)
