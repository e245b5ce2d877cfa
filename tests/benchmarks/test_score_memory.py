"""Memory and time of scores: each way is measured in a process of its own, and told beside plain training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import score_memory
from benchmarks.low_memory import llama, write_random
from benchmarks.score_memory import WAYS, measure
from benchmarks.tables import results_page


@pytest.mark.parametrize("way", WAYS)
def test_a_way_goes_over_all_samples(way: str, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    config = llama(64, 96, 2)
    total = write_random(source, config)
    found = measure(way, source, 2, 8)
    assert found.way == way and found.seconds > 0 and found.over_weights == pytest.approx(found.peak_gb * 1e9 / total)


def test_the_command_tells_and_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_memory, "RESULTS", tmp_path / "score_memory.json")
    monkeypatch.setattr(score_memory, "WAYS", {name: WAYS[name] for name in ("plain training", "mix, low")})
    sizes = ["--hidden", "64", "--ffn", "96", "--layers", "2", "--samples", "2", "--tokens", "8"]
    done = CliRunner().invoke(score_memory.app, [*sizes, "--json"], catch_exceptions=False)
    assert done.exit_code == 0 and "mix, low" in done.output
    data = json.loads((tmp_path / "score_memory.json").read_text())
    assert [row["way"] for row in data["rows"]] == ["plain training", "mix, low"]
    assert "| mix, low | " in results_page(tmp_path) and "on 2 x 8 tokens" in results_page(tmp_path)
