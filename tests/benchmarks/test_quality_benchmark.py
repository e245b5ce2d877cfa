"""Test the quality benchmark: its entries, resumed runs, questions and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fxprune
from benchmarks.pages import draw_quality, quality_page
from benchmarks.quality import __main__ as quality
from benchmarks.quality import entries as entries_module
from benchmarks.quality.entries import ENTRIES, Entry, entries
from benchmarks.quality.measure import Protocol, QualityRow, with_ratio
from tests.models import tiny
from tests.tokens import character_tokenizer


def test_every_entry_is_a_pipeline_that_can_be_made() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in entries():
        options = {key: with_ratio(value, 0.35) for key, value in entry.options.items()}
        assert "ratio=0.35" in str(fxprune.prune_pipeline(ids, ratio=0.35, **options)), entry.name
    assert [entry.name for entry in entries(["fast"])] == ["fast"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model, two cheap entries, and a folder of texts."""
    l1, l2 = ({"recipe": "llm-pruner", "importance": name} for name in ("l1", "l2"))
    cheap = (Entry("l1", l1), Entry("l2", l2, samples=0))
    monkeypatch.setattr(entries_module, "ENTRIES", (*cheap, Entry("none", {}, ("no-such-pass",))))
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results" / "quality.json")
    monkeypatch.setattr(quality, "load_named", lambda _: (tiny("llama"), character_tokenizer(), "tiny"))
    (tmp_path / "some").mkdir()
    (tmp_path / "c4.jsonl").write_text("\n".join(json.dumps({"text": "abcd" * 20}) for _ in range(3)))
    (tmp_path / "some" / "test.txt").write_text("held out " * 30)
    (tmp_path / "other.txt").write_text("another kind " * 30)
    return tmp_path


def run(folder: Path, *more: str) -> str:
    """What the benchmark prints."""
    sizes = ["--samples", "3", "--tokens", "8", "--windows", "2", "--window", "16", "--ratio", "0.1", "--json"]
    arguments = ["--data", str(folder), "--calibration", "c4.jsonl", *sizes, *more]
    result = CliRunner().invoke(quality.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_it_measures_each_entry_once_and_prints_the_protocol(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(small, "--only", "l1", "--keep", str(small / "kept"))
    assert fxprune.from_pretrained(small / "kept" / "l1-0.1-0").num_parameters() < tiny("llama").num_parameters()
    assert "tiny, calibrated on up to 3 x 8 tokens of c4.jsonl; perplexity on the first 2 x 16 tokens" in printed
    assert "dense: other.txt" in printed and "10%, draw 0: l1: other.txt" in printed and "l2" not in printed
    calls: list[str] = []
    prune = fxprune.prune

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(options["importance"])
        assert arguments[1] is None, "it is the entry without samples"
        return prune(*arguments, **options)

    monkeypatch.setattr(fxprune, "prune", watched)
    printed = run(small)
    assert calls == ["l2"] and "draw 0: l1" in printed
    data = json.loads(quality.RESULTS.read_text())
    assert [row["entry"] for row in data["rows"]] == ["dense", "l1", "l2"]
    assert set(data["rows"][1]["perplexities"]) == {"other.txt", "some/test.txt"}
    assert data["rows"][1]["passes"].startswith("calibrate{built_in=10}\nfind-groups\nl1\nselect-by-ratio{ratio=0.1}")
    page = quality_page(data)
    assert "## 10% of the parameters" in page and page.count("| x") >= 2 and "| l1 | " in page


def test_rows_of_another_protocol_are_kept_and_entries_without_samples_measured_once(small: Path) -> None:
    run(small, "--only", "l1", "--only", "l2", "--draws", "2")
    rows = json.loads(quality.RESULTS.read_text())["rows"]
    assert [(row["entry"], row["draw"]) for row in rows] == [("dense", 0), ("l1", 0), ("l2", 0), ("l1", 1)]
    before = quality.RESULTS.read_text()
    result = CliRunner().invoke(quality.app, ["--data", str(small), "--calibration", "c4.jsonl", "--json"])
    assert result.exit_code == 2 and "rows of another protocol" in " ".join(result.output.split())
    assert quality.RESULTS.read_text() == before


def test_saved_models_are_asked_beside_the_dense_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TASKS", quality.RESULTS.with_name("quality_tasks.json"))
    (small / "zeroshot").mkdir()
    lines = [json.dumps({"query": c, "choices": ["a", "bb"], "gold": i % 2}) for i, c in enumerate("abcdefgh")]
    (small / "zeroshot" / "quiz.jsonl").write_text("\n".join(lines))
    kept = ["--keep", str(small / "kept")]
    run(small, "--only", "l1", "--draws", "2", *kept)
    run(small, "--only", "l2")  # is not kept
    printed = run(small, "--questions", "3", "--bf16", *kept)
    assert "up to 3 questions" in printed and "l1, 10%" in printed and "l2, 10%" not in printed
    asked = json.loads(quality.TASKS.read_text())
    assert [column["name"] for column in asked["columns"]] == ["dense", "l1, 10%"]
    assert {column["evaluation"]["tasks"]["quiz"]["samples"] for column in asked["columns"]} == {3}
    page = " ".join(quality_page(json.loads(quality.RESULTS.read_text()), asked).split())
    assert "## Questions" in page and "| l1, 10% | 0." in page and "up to 3 questions of the second half" in page
    for options in (["--questions", "3"], ["--questions", "3", *kept, "--data", str(small / "some")]):
        with pytest.raises(AssertionError, match="needs --keep FOLDER"):
            run(small, *options)


def test_the_page_and_the_picture_show_draws(tmp_path: Path) -> None:
    def row(name: str, draw: int, value: float, cpu: str = "fast one") -> dict[str, Any]:
        return QualityRow(name, 0.2, draw, 80, {"text": value}, 10.0, 1.0, "l1", 2, cpu).__dict__

    protocol = Protocol("m", "c4", 4, 8, 2, 16).__dict__
    environment = {"cpu": "c", "threads": 1, "torch": "t", "transformers": "t"}
    rows = [row("dense", 0, 10.0), row("balanced", 0, 14.0), row("balanced", 1, 15.0)]
    data = {"protocol": protocol, "environment": environment, "rows": rows}
    assert "| balanced | 80 | x1.45 (1.40 to 1.50) | 10 | 2 | 1.0 | 2 |" in quality_page(data)
    assert "Ran on fast one; torch t" in quality_page(data), "the processor of the rows, not that of the last run"
    slower = {**data, "rows": [*rows, row("best", 0, 13.0, "slow one")]}
    assert "Ran on fast one; but these ran on slow one: best at 20%; torch t" in quality_page(slower)
    draw_quality(data, tmp_path / "picture.svg")
    other = {**data, "rows": [row("dense", 0, 10.0), row("balanced, otherwise", 0, 14.0)]}
    draw_quality(other, tmp_path / "other.svg")
    assert "balanced, otherwise" in (tmp_path / "other.svg").read_text()
    assert "balanced" in (tmp_path / "picture.svg").read_text() or (tmp_path / "picture.svg").stat().st_size > 1000
