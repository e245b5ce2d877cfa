"""Saved models timed side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import refused, run


def test_models_are_timed_side_by_side(models: Path) -> None:
    more = ("--prompt", 8, "--tokens", 3, "--rounds", 1)
    code, output, line = run("bench", models / "dense", models / "slim", *more)
    assert code == 0, line
    assert "┃ dense ┃ slim ┃" in output and output.count(" x) │") == 2 and "times as fast, by rounds" in output
    assert "batch 1, prompt of 8 tokens, then 3; medians of 1 rounds on cpu" in output
    code, output, _ = run("bench", models / "slim", *more, "--batch", 2, "--json")
    found = json.loads(output)["slim"]
    assert code == 0 and (found["batch"], found["prompt"], found["tokens"]) == (2, 8, 3) and found["peak"] is None


@pytest.mark.slow
def test_a_sweep_keeps_the_times_that_targets_of_speed_need(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense = models / "dense"
    code, output, line = run("bench", dense, "--sweep", "--prompt", 8, "--tokens", 3, "--rounds", 1)
    assert code == 0 and "15% less" in output and "kept in" in output, line
    (table,) = (tmp_path / "cache").rglob("*.json")
    times = json.loads(table.read_text())
    for place, (name, decode_ms) in enumerate(zip(times, (8.0, 7.0, 6.0, 5.0), strict=False)):
        times[name] |= {"decode_ms": decode_ms, "parameters": int(times["dense"]["parameters"] * (1 - 0.15 * place))}
    table.write_text(json.dumps(times))  # times of models this small say nothing
    options = ("--importance", "l2", "--recipe", "llm-pruner", "--target", "1.1x decode")
    code, output, line = run("prune", dense, "--out", tmp_path / "slim", *options)
    assert code == 0 and "Target 1.1x decode:" in output, line
    assert "is for one model" in refused("bench", dense, models / "slim", "--sweep")
