"""Tuning: vectors, low-rank updates or weights of the slim model, trained end to end."""

from .teacher import RecordTeacherPass as RecordTeacherPass
from .tune import TunePass as TunePass
