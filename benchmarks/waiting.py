"""Threads that spin or sleep while they wait, alone and beside other work: `python -m benchmarks.waiting`."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxprune.cli import SPIN_COUNT

_WORK = """
import time, torch
up, down, start = torch.randn(576, 1536), torch.randn(1536, 576), torch.randn(128, 576)
narrow = up.bfloat16(), down.bfloat16()
def run(steps):
    x = start
    for _ in range(steps):
        x = torch.relu(x @ up) @ down * 0.01 + start
        x = (torch.relu(x.bfloat16() @ narrow[0]) @ narrow[1]).float() * 0.01 + start
run(50)
begin = time.perf_counter()
run({steps})
print(time.perf_counter() - begin)
"""
"""Products of the size of an MLP of the demo model, run in a process of its own with its variables set."""

_WAYS = {
    "never sleep": {"OMP_WAIT_POLICY": "ACTIVE"},
    "spin long, as torch does": {},
    "spin briefly, as a command does": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def _spin() -> None:
    while True:
        pass


def _seconds(way: str, threads: int, steps: int) -> float:
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **_WAYS[way]}
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", _WORK.format(steps=steps)]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(
    threads: Annotated[int, typer.Option(min=2, help="Threads of the work.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the work, four products each.")] = 1500,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns; the fastest counts.")] = 3,
) -> None:
    """Time the same products with each way to wait, alone and beside one busy process."""
    table = Table("", "alone, s", "beside a busy process, s", title=f"{steps} steps, {threads} threads")
    times: dict[tuple[str, bool], float] = {}
    for busy in (False, True):
        other = multiprocessing.Process(target=_spin, daemon=True)
        if busy:
            other.start()
        for _ in range(rounds):
            for way in _WAYS:
                found = _seconds(way, threads, steps)
                times[way, busy] = min(found, times.get((way, busy), found))
        if busy:
            other.kill()
    for way in _WAYS:
        table.add_row(way, *(f"{times[way, busy]:.1f}" for busy in (False, True)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
