"""What a measurement ran on, to be printed beside every number."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

__all__ = ["environment"]


def environment() -> dict[str, str | int]:
    """Versions, processor and thread count of this process, in words fit for a report."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """The processor's name as Linux tells it, else what `platform` knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
