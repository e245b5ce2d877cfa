"""Test the recovery benchmark: its rows, texts and questions, and whole runs on a tiny model."""

import json
from pathlib import Path

import pytest

import fxprune
from benchmarks import recover
from benchmarks.common import local_tasks
from benchmarks.pages import results_page
from fxprune.checkpoint.manifest import read_manifest
from tests.benchmarks.command import run_main
from tests.models import tiny
from tests.tokens import character_tokenizer

SUMS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(40)]
QUESTIONS = [{"query": f"Is {i} even?", "choices": ["no", "yes"], "gold": (i + 1) % 2} for i in range(8)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("rows.json", "texts.jsonl", "book.txt", "quiz.jsonl")}
    found["rows.json"].write_text(json.dumps(SUMS))
    found["texts.jsonl"].write_text("\n".join(json.dumps({"text": f"Text number {i}."}) for i in range(30)))
    found["book.txt"].write_text("x " * 2050)
    found["quiz.jsonl"].write_text("\n".join(map(json.dumps, QUESTIONS)))
    return found


def test_rows_are_drawn_alike_from_each_file(files: dict[str, Path]) -> None:
    paths = [files[name] for name in ("rows.json", "texts.jsonl", "book.txt")]
    rows = recover.training_rows(paths, 12, seed=0)
    assert [sum("instruction" in row for row in rows), len(rows)] == [4, 11]
    assert sorted(len(row["text"]) for row in rows[8:]) == [100, 2000, 2000]
    assert rows == recover.training_rows(paths, 12, seed=0) != recover.training_rows(paths, 12, seed=1)
    assert len(recover.without(rows, f"... {rows[4]['text']} ...")) == 10


def test_rows_of_every_form_are_kept_unless_they_are_measured_on(tmp_path: Path) -> None:
    """Chats once counted as empty text, which every text contains."""
    chat = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    rows = [chat, {"text": "a text"}, {"text": "another"}, SUMS[0]]
    (tmp_path / "rows.json").write_text(json.dumps([chat, "a text", *rows[2:]]))
    assert sorted(map(str, recover.training_rows([tmp_path / "rows.json"], 9, 0))) == sorted(map(str, rows))
    assert recover.without(rows, "measured on") == rows
    assert recover.without(rows, "Hi.\n\nHello. And a text.") == rows[2:]


def test_texts_of_one_folder_have_names_of_their_own() -> None:
    found = recover.named([Path("a/test.txt"), Path("a/valid.txt"), Path("b/test.txt")])
    assert found == {"a/test": Path("a/test.txt"), "a/valid": Path("a/valid.txt"), "b": Path("b/test.txt")}


def test_calibration_is_spread_over_the_rows() -> None:
    tokenizer = character_tokenizer()
    windows = recover.calibration_windows(tokenizer, [{"text": "a" * 50}, {"text": "b" * 50}], samples=3, tokens=20)
    assert windows.shape == (3, 20)
    assert [tokenizer.decode(window)[0] for window in windows] == ["a", "a", "b"]


def test_the_start_of_a_text_is_measured_as_well(files: dict[str, Path]) -> None:
    files["book.txt"].write_text("abcdefgh" * 20)
    found = recover.starts(character_tokenizer(), {"book": files["book.txt"], "built-in": "some text"}, 3, 16)
    assert found == {"book, its start": "abcdefgh" * 6}


def test_each_half_of_the_questions_is_asked_by_itself(files: dict[str, Path]) -> None:
    first, second = (local_tasks([files["quiz.jsonl"]], half)["quiz"] for half in ("first", "second"))
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, None)
    assert run_main(recover.main, "--half", "secnd").exit_code == 2


@pytest.mark.slow
def test_a_run_writes_the_section_of_the_results_page(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "load_demo_model", lambda *_: (tiny("llama"), character_tokenizer()))
    monkeypatch.setattr(recover, "RESULTS", tmp_path / "results" / "recovery.json")
    options = "--samples 2 --recipe fast --windows 2 --window 64 --asked 3 --learning-rate 5e-3 --json"
    paths = {"data": files["rows.json"], "text": files["book.txt"], "questions": files["quiz.jsonl"]}
    command = [*options.split(), *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]
    command += ["--out", str(tmp_path / "out")]
    outcome = run_main(recover.main, *command)
    assert outcome.exit_code == 0
    data = json.loads((tmp_path / "results" / "recovery.json").read_text())
    assert [column["name"] for column in data["columns"]] == ["dense", "pruned", "recovered"]
    assert data["columns"][1]["parameters"] == data["columns"][2]["parameters"] < data["columns"][0]["parameters"]
    assert data["settings"]["held_out_loss"][1] < data["settings"]["held_out_loss"][0]
    assert data["settings"]["data"] == ["rows.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"comparison.{s}" for s in ("json", "md", "png")}
    page = results_page(tmp_path / "results")
    flat = " ".join(page.split())
    assert "by the recipe `fast` as it was then (`calibrate" in flat and "2 windows of 64 tokens" in flat
    assert "## Recovery: `make bench-recover`" in page
    assert ("| average accuracy retained on quiz | 100.0% ± 0.0% |" in page) is (data["retained_of"] == ["quiz"])


@pytest.mark.slow
def test_a_slim_model_saved_before_is_recovered(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "load_demo_model", lambda *_: (tiny("llama"), character_tokenizer()))
    monkeypatch.setattr(recover, "RESULTS", tmp_path / "results" / "recovery.json")
    result = fxprune.prune(tiny("llama"), ratio=0.2, recipe="llm-pruner", importance="l2")
    result.save_pretrained(tmp_path / "slim")
    command = ["--slim", str(tmp_path / "slim"), "--recipe", "fast", "--windows", "2", "--window", "64", "--json"]
    command += ["--data", str(files["rows.json"]), "--text", str(files["book.txt"]), "--keep", str(tmp_path / "kept")]
    outcome = run_main(recover.main, *command)
    assert outcome.exit_code == 0
    data = json.loads((tmp_path / "results" / "recovery.json").read_text())
    assert data["columns"][1]["parameters"] == result.report.parameters[1]
    assert data["settings"]["passes"] == json.loads(json.dumps(result.report.passes))
    assert data["settings"]["slim"] == "slim" and "keep" not in data["settings"]
    kept = fxprune.from_pretrained(tmp_path / "kept")
    assert kept.num_parameters() == result.report.parameters[1]
    manifest = read_manifest(tmp_path / "kept")
    assert manifest.read_plan(tmp_path / "kept") == result.plan
    assert manifest.read_report(tmp_path / "kept") is not None
