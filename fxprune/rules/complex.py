"""Complex numbers: a last axis of two becomes the parts of one number, and back."""

from __future__ import annotations

from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["view_as_complex", "view_as_real"]


@rule("view_as_complex", "_conj", "_conj_physical", "resolve_conj", "conj_physical")
def view_as_complex(op: OpSite) -> None:
    """``self (.., 2)`` is ``out (..)``: the two parts of a number stay together."""
    x = op.tensors[0]
    _pair(op, x, op.out)


@rule("view_as_real")
def view_as_real(op: OpSite) -> None:
    """``self (..)`` is ``out (.., 2)``: the two parts of a number stay together."""
    _pair(op, op.out, op.tensors[0])


def _pair(op: OpSite, real: TensorAxes, numbers: TensorAxes) -> None:
    for i in range(numbers.rank):
        op.tie(real, i, numbers, i)
    if real.rank > numbers.rank:
        op.freeze(real, -1, "the real and the imaginary part of a number")
