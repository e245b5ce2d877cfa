"""Output of commands: what goes where, progress, and what `--quiet` leaves of each command."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fxprune.cli import console
from fxprune.report.quality import figures_table
from tests.cli.running import invoked, refused, run

SMALL = ("--prompt", 8, "--tokens", 3, "--rounds", 1)


@pytest.fixture(autouse=True)
def usual_output() -> Iterator[None]:
    yield
    console.set_output()


def test_help_comes_without_a_command_and_lists_commands_in_the_order_of_use() -> None:
    done = invoked()
    assert done.exit_code == 0
    lines = done.stdout.partition("Commands")[2].splitlines()
    names = [line[2:].split()[0] for line in lines if line.startswith("│ ") and line[2] != " "]
    wanted = "prune sweep apply eval recover generate chat bench export serve graph explain plan recipes passes"
    assert names == wanted.split()


def test_the_help_of_a_prune_has_panels_with_the_options_of_the_library() -> None:
    text = invoked("prune", "--help").stdout
    places = [text.index(f"─ {panel} ") for panel in ("Arguments", "What goes", "Data", "Output", "Machine")]
    assert places == sorted(places)
    for option in ("--ratio", "--importance", "--protect", "--calibration", "--round-to", "--in-place", "--low-memory"):
        assert f" {option} " in text
    assert "--taylor" not in text and "--track" not in text and "`" not in text


def test_progress_is_printed_to_a_pipe_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert list(console.progress(range(10), "scoring", 10)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 1 of 10, about 54 s left" and len(lines) == 3
    with console.working("tracing"):
        pass
    assert capsys.readouterr().err == "tracing ...\n"


def test_quiet_and_json_silence_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_output(quiet=True)
    console.console.print("result")
    with console.working("tracing"):
        assert list(console.progress(iter("ab"), "scoring", 2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    console.set_output(as_json=True)
    console.console.print("result")
    console.print_json({"out": "slim"})
    assert json.loads(capsys.readouterr().out) == {"out": "slim"}


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `slim[v2]` was the column `slim` of a table, and in a terminal `[/` in a path ended in a traceback."""
    console.console.print(figures_table(("", "slim[v2]"), [("perplexity, notes[/old].txt", "1.0")]))
    printed = capsys.readouterr().out
    assert "slim[v2]" in printed and "notes[/old].txt" in printed
    terminal = Console(file=io.StringIO(), force_terminal=True, markup=False)
    monkeypatch.setattr(console, "notes", terminal)
    with console.working("loading slim[/v2]"):
        assert list(console.progress([1], "perplexity of slim[/v2]", 1)) == [1]


@pytest.mark.parametrize(
    ("command", "options", "result"),
    [
        ("eval", ("--text", "story.txt", "--window", 32), "perplexity"),
        ("bench", SMALL, "each further token, ms"),
        ("generate", ("so it", "--max-new-tokens", 4), ""),
    ],
)
def test_quiet_leaves_the_result_of_a_measurement(
    models: Path,
    command: str,
    options: tuple[object, ...],
    result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("A quiet river runs past the old mill. " * 8)
    code, output, lines = run(command, models / "slim", *options, "-q")
    assert (code, lines) == (0, "") and result in output and output
    assert "loading" in run(command, models / "slim", *options)[2]


@pytest.mark.slow
def test_quiet_leaves_nothing_of_a_command_that_writes(models: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"What is {i} and one?", "output": f"{i + 1}."} for i in range(8)]))
    plan, quiet, fast = models / "slim/plan.json", "--quiet", ("--epochs", 1, "--batch", 4)
    assert run("apply", models / "dense", plan, "--out", tmp_path / "again", quiet) == (0, "", "")
    assert run("export", tmp_path / "again", tmp_path / "slim.pt2", quiet) == (0, "", "")
    assert run("recover", tmp_path / "again", "--data", rows, "--out", tmp_path / "new", *fast, quiet) == (0, "", "")
    assert (tmp_path / "slim.pt2").is_file() and (tmp_path / "new/recovery.json").is_file()


def test_verbose_prints_each_pass(models: Path, tmp_path: Path) -> None:
    more = ("apply", models / "dense", models / "slim/plan.json", "--out", tmp_path / "again")
    assert "find-groups: " in run(*more, "--verbose")[2]


@pytest.mark.slow
def test_quiet_leaves_nothing_of_a_prune_on_disk(models: Path, tmp_path: Path) -> None:
    """Bars of transformers, and its remark on a renamed cache, were printed."""
    options = ("--low-memory", "--recipe", "llm-pruner", "--importance", "l2", "--quiet")
    assert run("prune", models / "dense", "--out", tmp_path / "slim", *options) == (0, "", "")


def test_of_several_processes_the_first_prints(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of JSON came from each."""
    asked = ("prune", models / "dense", "--dry-run", "--recipe", "llm-pruner", "--importance", "l2")
    code, printed, _ = run(*asked, "--json")
    assert code == 0 and json.loads(printed)
    monkeypatch.setattr("fxprune.offload.ranks.is_first", lambda: False)
    assert run(*asked, "--json") == run(*asked) == (0, "", "")


def test_commands_that_processes_do_not_share_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("bench", models / "dense") == "fxprune bench: it runs in one process. Start it without torchrun"
    monkeypatch.setattr("fxprune.offload.ranks.world_size", lambda: 2)
    line = refused("recover", models / "slim", "--data", "alpaca", "--out", "new")
    assert line == "--folder: several processes need one folder. Give --folder, one that all of them can write to"
