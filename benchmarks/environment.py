"""What a measurement ran on, to be printed beside every number."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["cpu_name", "environment", "write_results"]


def environment() -> dict[str, str | int]:
    """Versions, processor and thread count of this process, in words fit for a report."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what `platform` knows, and what torch makes use of in it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or "unknown")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def write_results(path: Path, content: Mapping[str, Any], versions: Mapping[str, str] | None = None) -> None:
    """Write what was measured as JSON, below what it ran on.

    Args:
        path: The file; the folder of it is made.
        content: What JSON can say.
        versions: Of further packages that took part, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"environment": {**environment(), **(versions or {})}, **content}
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
