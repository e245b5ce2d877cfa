"""What aligned widths buy on a device: measured once, kept in a file, read by ``round_to="auto"``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import whole_number

__all__ = ["MULTIPLES", "Widths", "device_name", "measure_widths", "read_widths", "widths_file", "write_widths"]

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
"""What widths may be multiples of."""

_ROWS = (1, 256)
"""Tokens in a product: those of a decoding step, and of a prompt."""

_NEAR = 3
"""Widths that stand for one multiple."""

_SLACK = 0.03
"""A coarser multiple has to be worth more than that: it takes away from what a plan may choose."""

_LEAST_S = 2e-3
"""Seconds of one measurement."""


@dataclass(frozen=True)
class Widths:
    """What multiples cost on a device.

    Args:
        device: its name.
        costs: by multiple, the time of a column of an MLP whose width is a multiple of that and of nothing coarser,
            over the least of all. Of a prompt's tokens and of a decoding step's, the larger.
    """

    device: str
    costs: Mapping[int, float]

    def best(self) -> int:
        """Return the finest multiple that costs no more than 3% over the best."""
        least = min(self.costs.values())
        return min(multiple for multiple, cost in self.costs.items() if cost <= least * (1 + _SLACK))


def measure_widths(hidden: int, width: int, device: torch.device | str = "cpu", rounds: int = 9) -> Widths:
    """Time gated MLPs of widths that are multiples of more and of less, side by side.

    On a GPU in half precision, else in float32, with as many threads as torch is set to.

    Args:
        hidden: columns of what goes in.
        width: about how wide the MLP is; the widths measured lie below it.
        device: where.
        rounds: measurements of each, of which the median counts.

    Raises:
        ArgumentError: the width is too small to tell multiples apart.
    """
    whole_number("hidden", hidden, least=1)
    whole_number("width", width, least=4 * MULTIPLES[-1])
    device = torch.device(device)
    sizes = {multiple: _near(width, multiple) for multiple in MULTIPLES}
    over = [_over_least(times) for times in _times(hidden, sizes, device, rounds)]
    costs = {multiple: max(found[multiple] for found in over) for multiple in MULTIPLES}
    return Widths(device_name(device), _over_least(costs))


def _near(width: int, multiple: int) -> list[int]:
    """Return widths below that are multiples of one number and not of its double."""
    first = width // (2 * multiple) * 2 * multiple - multiple
    return [first - 2 * multiple * i for i in range(_NEAR)] if multiple < MULTIPLES[-1] else [first - multiple]


def _over_least(times: Mapping[int, float]) -> dict[int, float]:
    least = min(times.values())
    return {multiple: time / least for multiple, time in times.items()}


def _times(hidden: int, sizes: Mapping[int, list[int]], device: torch.device, rounds: int) -> list[dict[int, float]]:
    """Return seconds of a column by multiple, for each number of rows."""
    jobs: list[tuple[int, int, int, Callable[[], float]]] = []
    for rows in _ROWS:
        jobs += [(rows, m, width, _job(rows, hidden, width, device)) for m, widths in sizes.items() for width in widths]
    found: dict[tuple[int, int, int], list[float]] = {job[:3]: [] for job in jobs}
    with torch.inference_mode():
        for number in range(rounds):
            for rows, multiple, width, job in jobs if number % 2 == 0 else reversed(jobs):
                found[rows, multiple, width].append(job() / width)

    def cost(rows: int, multiple: int) -> float:
        return median(median(times) for key, times in found.items() if key[:2] == (rows, multiple))

    return [{multiple: cost(rows, multiple) for multiple in sizes} for rows in _ROWS]


def _job(rows: int, hidden: int, width: int, device: torch.device) -> Callable[[], float]:
    """Return a job that measures the seconds of a gated MLP."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        value: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return value.to(device, dtype)

    x, gate, up, down = drawn(rows, hidden), drawn(width, hidden), drawn(width, hidden), drawn(hidden, width)

    def call() -> Any:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        timer.timeit(2)
        number = max(1, round(_LEAST_S / timer.timeit(2).mean))
    return lambda: float(timer.timeit(number).mean)


def device_name(device: torch.device) -> str:
    """Return what the device is called: the same for all of its kind, with the number of threads of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def widths_file() -> Path:
    """Return where what was measured is kept: ``$FXPRUNE_WIDTHS``, or a file in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FXPRUNE_WIDTHS") or cache / "fxprune" / "widths.json")


def write_widths(widths: Widths) -> Path:
    """Keep what was measured on a device, in place of what was kept of it; return the file."""
    path = widths_file()
    kept = {**_kept(path), widths.device: {str(multiple): cost for multiple, cost in widths.costs.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return path


def read_widths(device: torch.device) -> Widths:
    """Return what was measured on a device.

    Raises:
        ArgumentError: nothing was, or the file holds something else.
    """
    path, name = widths_file(), device_name(device)
    kept = _kept(path).get(name)
    if kept is None:
        raise ArgumentError(
            f"round_to='auto' needs widths measured on {name}, and {path} has none",
            where="round_to",
            remedy="Call fxprune.evaluation.write_widths(fxprune.evaluation.measure_widths(hidden, width)), or name a "
            "multiple such as 32",
        )
    return Widths(name, kept)


def _kept(path: Path) -> dict[str, dict[int, float]]:
    """Return what a file holds by device; nothing where there is no file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {
            str(device): {int(multiple): float(cost) for multiple, cost in costs.items()}
            for device, costs in held.items()
            if costs
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} holds no widths: {error}", where="round_to", remedy="Take it away and measure again"
        ) from error
