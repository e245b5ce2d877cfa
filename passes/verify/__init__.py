"""Verification: masking equals shrinking."""

from .record_expected import RecordExpectedPass
from .verify_removal import VerifyRemovalPass

__all__ = ["RecordExpectedPass", "VerifyRemovalPass"]
