"""Verification: masking equals shrinking."""

from passes.verify.record_expected import RecordExpectedPass
from passes.verify.verify_removal import VerifyRemovalPass

__all__ = ["RecordExpectedPass", "VerifyRemovalPass"]
