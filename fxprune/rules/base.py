"""For imports that still say base; goes at the end of the move."""

from fxprune.rules.statements import Axis, TensorAxes

__all__ = ["Axis", "TensorAxes"]
