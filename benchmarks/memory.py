"""Resident memory of this process, as Linux tells it; elsewhere it is 0."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["anonymous_bytes", "forget_peak", "peak_bytes", "resident_bytes"]


def forget_peak() -> None:
    """The kernel forgets the largest memory so far; elsewhere than on Linux it does not."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> float:
    """The most since the peak was forgotten."""
    return _status("VmHWM")


def resident_bytes() -> float:
    """What is resident now."""
    return _status("VmRSS")


def anonymous_bytes() -> float:
    """What is resident now and no page of a file."""
    return _status("RssAnon")


def _status(key: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith(key)), 0.0)
