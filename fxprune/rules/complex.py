"""Complex numbers: a last axis of two becomes the parts of one number, and back."""

from __future__ import annotations

from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["view_as_complex", "view_as_real"]

rule("_conj", "_conj_physical", "resolve_conj", "conj_physical", notation="self[*a] -> out[*a]", values="pointwise")


@rule("view_as_complex", values="moved")
def view_as_complex(op: OpSite) -> None:
    """``self (.., 2)`` is ``out (..)``: the two parts of a number stay together."""
    _pair(op, op.need("self"), op.out)


@rule("view_as_real", values="moved")
def view_as_real(op: OpSite) -> None:
    """``self (..)`` is ``out (.., 2)``: the two parts of a number stay together."""
    _pair(op, op.out, op.need("self"))


def _pair(op: OpSite, real: TensorAxes, numbers: TensorAxes) -> None:
    for i in range(numbers.rank):
        op.tie(real, i, numbers, i)
    op.freeze(real, -1, "the real and the imaginary part of a number")
