"""Tuning: vectors, low-rank updates or weights of the slim model, trained end to end."""

from .teacher import RecordTeacherPass
from .tune import TunePass

__all__ = ["RecordTeacherPass", "TunePass"]
