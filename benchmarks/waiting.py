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

_WORK = """
import time, torch
up, down, start = torch.randn(576, 1536), torch.randn(1536, 576), torch.randn(128, 576)
def run(steps):
    x = start
    for _ in range(steps):
        x = torch.relu(x @ up) @ down * 0.01 + start
run(50)
begin = time.perf_counter()
run({steps})
print(time.perf_counter() - begin)
"""
"""Products of the size of an MLP of the demo model, run in a process of its own with its variables set."""


def _spin() -> None:
    while True:
        pass


def _seconds(policy: str, threads: int, steps: int) -> float:
    variables = {"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", _WORK.format(steps=steps)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(
    threads: Annotated[int, typer.Option(min=2, help="Threads of the work.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the work, two products each.")] = 1500,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns; the fastest counts.")] = 3,
) -> None:
    """Time the same products with both policies, alone and beside one busy process."""
    table = Table("", "alone, s", "beside a busy process, s", title=f"{steps} steps, {threads} threads")
    times: dict[tuple[str, bool], float] = {}
    for busy in (False, True):
        other = multiprocessing.Process(target=_spin, daemon=True)
        if busy:
            other.start()
        for _ in range(rounds):
            for policy in ("ACTIVE", "PASSIVE"):
                found = _seconds(policy, threads, steps)
                times[policy, busy] = min(found, times.get((policy, busy), found))
        if busy:
            other.kill()
    for policy in ("ACTIVE", "PASSIVE"):
        table.add_row(policy, *(f"{times[policy, busy]:.1f}" for busy in (False, True)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
