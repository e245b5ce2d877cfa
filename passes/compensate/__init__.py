"""Compensation: weights fitted after a selection, before anything is cut."""

from .fits import LeastSquaresPass, RotationPass

__all__ = ["LeastSquaresPass", "RotationPass"]
