"""Text for the benchmarks: the package's own helpers, under the name that benchmarks know."""

from __future__ import annotations

from fxprune.data.text import offline_text, read_text, split_calibration_heldout, token_windows

__all__ = ["offline_text", "read_text", "split_calibration_heldout", "token_windows"]
