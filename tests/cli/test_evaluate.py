"""Saved models measured from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import fxprune
import fxprune.cli.evaluate
import fxprune.data.built_in
from tests.cli.running import refused, run

TEXT = "A quiet river runs past the old mill, and nobody counts the boats on it. " * 8


def test_slim_stands_beside_dense(models: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    more = ("--text", tmp_path / "story.txt", "--window", 32)
    code, output, _ = run("eval", models / "slim", "--compare", models / "dense", *more)
    assert code == 0 and "┃ dense ┃ slim ┃" in output
    assert all(word in output for word in ("│ parameters │", "│ memory, MB │", "│ perplexity, story │"))
    assert "latency" not in output and "MACs" not in output, "these are not measured"
    code, output, _ = run("eval", models / "slim", "--compare", models / "dense", *more, "--no-answers", "--json")
    dense, slim = json.loads(output)["columns"]
    model = fxprune.from_pretrained(models / "slim")
    assert slim["parameters"] == sum(p.numel() for p in model.parameters()) < dense["parameters"]
    assert slim["evaluation"]["perplexities"]["story"]["window"] == 32
    assert (slim["name"], slim["macs"], slim["latency_ms"]) == ("slim", None, None)


@pytest.mark.slow
def test_weights_stay_on_disk_where_that_is_asked(models: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    more = ("--text", tmp_path / "story.txt", "--window", 32, "--json")
    found = []
    for option in ((), ("--low-memory",)):
        code, output, _ = run("eval", models / "slim", "--compare", models / "dense", *more, *option)
        assert code == 0
        found.append([c["evaluation"]["perplexities"]["story"]["value"] for c in json.loads(output)["columns"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_built_in_text_is_taken_in_part(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measured(compared: object, loading: object, options: dict[str, Any], *_: object, **__: object) -> None:
        seen.update(options)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune.cli.evaluate, "_measure", measured)
    monkeypatch.setattr(fxprune.data.built_in, "offline_docstrings", lambda: "some text")
    refused("eval", models / "slim")
    assert seen.pop("texts") == {"docstrings of Python": "some text"} and seen.pop("windows") == 64
    refused("eval", models / "slim", "--windows", 3)
    assert seen["windows"] == 3


def test_tasks_in_a_file_are_asked(models: Path, tmp_path: Path) -> None:
    question = {"query": "Two and two is", "choices": [" four", " five"], "gold": 0}
    (tmp_path / "sums.jsonl").write_text(json.dumps(question))
    code, output, _ = run("eval", models / "dense", models / "slim", "--tasks", tmp_path / "sums.jsonl")
    assert (
        code == 0 and "│ sums, acc_norm │" in output and "│ retained │ 100.0%" in output and "perplexity" not in output
    )


def test_a_model_without_a_tokenizer_has_that_of_the_dense_one(models: Path, tmp_path: Path) -> None:
    fxprune.save_pretrained(fxprune.from_pretrained(models / "slim"), tmp_path / "slim")
    (tmp_path / "story.txt").write_text(TEXT)
    more = ("--text", tmp_path / "story.txt", "--window", 32, "--no-answers", "--json")
    code, output, line = run("eval", tmp_path / "slim", "--compare", models / "dense", *more)
    assert code == 0, line
    assert output.startswith('{ "settings"')
    assert "its tokenizer cannot be read" in refused("eval", tmp_path / "slim", *more)


def test_texts_and_tasks_are_refused_before_a_model_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a b")
    slim = models / "slim"
    assert "holds no window of 256" in refused("eval", slim, "--text", tmp_path / "short.txt")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'fxprune[eval]'" in refused("eval", slim, "--tasks", "piqa")


@pytest.mark.slow
def test_the_nearest_task_is_suggested(models: Path) -> None:
    assert "Did you mean 'piqa'" in refused("eval", models / "slim", "--tasks", "arc_easy, piqqa")


def test_figures_are_written_into_the_folder(models: Path, tmp_path: Path) -> None:
    """The weights stay, files of the user too, and the checkpoint is whole."""
    slim = tmp_path / "slim"
    shutil.copytree(models / "slim", slim)
    (tmp_path / "story.txt").write_text(TEXT)
    (slim / "notes").mkdir()
    (slim / "notes/mine.txt").write_text("mine")
    weights = (slim / "model.safetensors").stat().st_ino
    more = ("--text", tmp_path / "story.txt", "--window", 32, "--no-answers")
    code, output, _ = run("eval", slim, "--compare", models / "dense", *more, "--write")
    assert code == 0 and "perplexity, story" in output
    assert {path.name for path in tmp_path.iterdir()} == {"slim", "story.txt"}
    assert (slim / "model.safetensors").stat().st_ino == weights
    assert (slim / "notes/mine.txt").read_text() == "mine"
    fxprune.from_pretrained(slim, verify=True)
    report = json.loads((slim / "report.json").read_text())
    assert report["quality"]["texts"][0]["text"] == "story" and ["memory, MB"] in [
        row[:1] for row in report["measured"]
    ]
    cells = next(row for row in report["measured"] if row[0] == "perplexity, story")
    assert " | ".join(cells) in (slim / "README.md").read_text() and cells[1] in (slim / "report.html").read_text()
    (slim / "README.md").write_text("my own card")
    assert run("eval", slim, "--compare", models / "dense", *more, "--write")[0] == 0
    assert (slim / "README.md").read_text() == "my own card"
    (slim / "plan.json").write_text("{}")
    assert "its content was changed" in refused("eval", slim, "--compare", models / "dense", *more, "--write")
