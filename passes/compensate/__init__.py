"""Compensation: what stays is adjusted to what went."""

from passes.compensate.least_squares import LeastSquaresPass

__all__ = ["LeastSquaresPass"]
