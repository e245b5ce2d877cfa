"""Compensation: weights fitted after a selection, before anything is cut."""

from .fits import LeastSquaresPass as LeastSquaresPass
from .fits import RotationPass as RotationPass
