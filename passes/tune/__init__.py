"""Tuning: a few vectors trained end to end on the slim model, and folded into its weights."""

from .teacher import RecordTeacherPass
from .tune import TunePass

__all__ = ["RecordTeacherPass", "TunePass"]
