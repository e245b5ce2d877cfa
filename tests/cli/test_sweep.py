"""The sweep command: its table, what it recommends, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import run

L2 = ("--recipe", "llm-pruner", "--importance", "l2", "--protect", "0,0")


@pytest.mark.slow
def test_a_sweep_sets_size_against_quality(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    more = (*L2, "--ratio", "0.1,0.3", "--out", out, "--keep", "none")
    code, output, line = run("sweep", models / "dense", *more, "--at-most", "9x")
    assert code == 0, line
    assert "│ llm-pruner-0.1 │" in output and "│ llm-pruner-0.3 │" in output
    assert "measured on docstrings of Python: 12 windows" in output
    assert "perplexity at most 9 x: llm-pruner-0.3" in output
    assert {path.name for path in out.iterdir()} == {"sweep.json", "sweep.md", "sweep.svg"}
    code, output, line = run("sweep", models / "dense", *more, "--at-most", "0.01", "--json")
    assert code == 0 and "pruning" not in line and "perplexity:" not in line, "all of it was done"
    found = json.loads(output)
    assert found["recommended"] is None and [row["ratio"] for row in found["rows"]] == [0.1, 0.3]
    assert found["rows"] == json.loads((out / "sweep.json").read_text())["rows"]
