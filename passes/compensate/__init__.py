"""Compensation: what stays is adjusted to what went."""

from .least_squares import LeastSquaresPass
from .rotation import RotationPass

__all__ = ["LeastSquaresPass", "RotationPass"]
