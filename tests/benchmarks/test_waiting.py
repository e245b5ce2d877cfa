"""The benchmark of waiting threads."""

from __future__ import annotations

import pytest

from benchmarks.waiting import main
from tests.benchmarks.command import run_main


@pytest.mark.slow
def test_both_policies_are_timed_alone_and_beside_other_work() -> None:
    done = run_main(main, "--steps", "1", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert "ACTIVE" in done.output and "PASSIVE" in done.output and "beside a busy process" in done.output
