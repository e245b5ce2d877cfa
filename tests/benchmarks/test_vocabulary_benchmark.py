"""Test the benchmark of vocabularies: pieces, ratios, a run on a tiny model, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import benchmarks.vocabulary as benchmark
from benchmarks.pages import vocabulary_page
from tests.benchmarks.command import run_main
from tests.vocabulary.small import lines, tokenizer
from tests.vocabulary.test_prune import model_for


def test_the_same_pieces_are_compared() -> None:
    assert [len(piece) for piece in benchmark.pieces_of("a" * 2000, 5000)] == [800, 800]
    assert benchmark.pieces_of("a" * 2000, 800) == ["a" * 800]
    assert benchmark.ratio_of([2.0], [1.0]) == (2.0, 0.0)
    assert benchmark.ratio_of([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    ratio, error = benchmark.ratio_of([1.0, 3.0], [1.0, 2.0])
    assert ratio == pytest.approx(4 / 3) and error == pytest.approx(math.sqrt(2 * 2 * (1 / 3) ** 2) / 3)


def test_a_run_writes_rows_and_the_page_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["\n".join(lines(80, seed)) for seed in range(5)]
    (tmp_path / "c4_sample.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "wikitext2").mkdir()
    for place in ("wiki_sample.txt", "wikitext2/test.txt"):
        (tmp_path / place).write_text(texts[0])
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "load_named", lambda _: (model_for("gpt2"), tokenizer("gpt2"), "tiny"))
    result = run_main(benchmark.main, "--data", str(tmp_path), "--ratio", "0.2", "--characters", "1600")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "vocabulary-tiny.json").read_text())
    dense, slim = written["rows"]
    assert slim["tokens"] < dense["tokens"] and len(slim["texts"]) == 3
    assert all(text["over_dense"] > 0 and text["bits_per_byte"] > 0 for text in slim["texts"].values())
    page = vocabulary_page([written])
    assert f"| 20% | {slim['tokens']} | " in page and "wiki_sample.txt (2 pieces)" in page
