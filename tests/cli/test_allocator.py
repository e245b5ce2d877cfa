"""Trimming of the allocator is disabled, or left alone on others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fxprune.cli import console as allocator
from fxprune.cli.console import keep_freed

TAKES_AND_FREES = """
import resource, sys, torch
from fxprune.cli.console import keep_freed
if sys.argv[1] == "keep" and not keep_freed():
    sys.exit(3)
counts = []
for turn in range(8):
    torch.ones(48 * 2**20, dtype=torch.uint8)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[0])
"""


def pages(how: str) -> int:
    """Page faults while 48 MB are allocated and freed several times."""
    done = subprocess.run([sys.executable, "-c", TAKES_AND_FREES, how], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the allocator takes no such options")
    return int(done.stdout)


@pytest.mark.slow
def test_freed_memory_is_taken_again() -> None:
    assert pages("keep") < pages("as it is") / 5


def test_another_allocator_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not keep_freed()
