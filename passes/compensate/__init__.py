"""Compensation: what stays is adjusted to what went."""

from .least_squares import LeastSquaresPass

__all__ = ["LeastSquaresPass"]
