"""Text, calibration samples, and inputs to verify with."""
