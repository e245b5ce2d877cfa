"""Test the benchmark of memory and time of scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import score_memory
from benchmarks.common import Shape, write_random
from benchmarks.pages import results_page
from benchmarks.score_memory import WAYS, measure
from tests.benchmarks.command import run_main


@pytest.mark.slow
def test_every_way_goes_over_all_samples(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    total = write_random(source, Shape.of_width(64, 96, 2).config(), shard_bytes=100_000)
    assert len(list(source.glob("*.safetensors"))) > 2
    for way in WAYS:
        found = measure(way, source, 2, 8)
        assert found.way == way and found.seconds > 0
        assert found.over_weights == pytest.approx(found.peak_gb * 1e9 / total)


@pytest.mark.slow
def test_the_command_prints_and_writes_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_memory, "RESULTS", tmp_path / "score_memory.json")
    monkeypatch.setattr(score_memory, "WAYS", {name: WAYS[name] for name in ("plain training", "mix, low")})
    sizes = ["--hidden", "64", "--ffn", "96", "--layers", "2", "--samples", "2", "--tokens", "8"]
    done = run_main(score_memory.main, *sizes, "--json")
    assert done.exit_code == 0 and "mix, low" in done.output
    data = json.loads((tmp_path / "score_memory.json").read_text())
    assert [row["way"] for row in data["rows"]] == ["plain training", "mix, low"]
    assert "| mix, low | " in results_page(tmp_path) and "on 2 x 8 tokens" in results_page(tmp_path)
