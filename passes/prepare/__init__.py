"""Preparation: calibration samples, inputs to verify with, and the size of what is to be pruned."""

from .calibrate import CalibratePass
from .count_work import CountWorkPass
from .make_verification_inputs import MakeVerificationInputsPass

__all__ = ["CalibratePass", "CountWorkPass", "MakeVerificationInputsPass"]
