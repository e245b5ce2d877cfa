"""Compensation: weights fitted after a selection, before anything is cut."""

from .least_squares import LeastSquaresPass
from .rotation import RotationPass

__all__ = ["LeastSquaresPass", "RotationPass"]
