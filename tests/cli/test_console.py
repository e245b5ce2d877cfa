"""What is printed, where, and how far things are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from fxprune.cli import app, console


@pytest.fixture(autouse=True)
def usual_output() -> Iterator[None]:
    yield
    console.set_output()


def test_help_comes_without_a_command_and_errors_in_one_line() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0 and "prune" in done.stdout
    done = CliRunner().invoke(app, ["prune", "--nonsense"])
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No such option")


def test_commands_are_listed_in_the_order_of_use() -> None:
    lines = CliRunner().invoke(app, ["--help"]).stdout.partition("Commands")[2].splitlines()
    names = [line[2:].split()[0] for line in lines if line.startswith("│ ") and line[2] != " "]
    wanted = ("prune", "apply", "eval", "recover", "generate", "bench", "export", "graph", "explain", "plan", "recipes")
    assert names == [*wanted, "passes"]


def test_a_piped_output_is_told_now_and_then_how_far_it_is(
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


def test_quiet_prints_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_output(quiet=True)
    console.console.print("result")
    with console.working("tracing"):
        assert list(console.progress(iter("ab"), "scoring", 2)) == ["a", "b"]
    with pytest.raises(typer.Exit), console.clear_errors():
        raise OSError(2, "No such file", "here.txt")
    told = capsys.readouterr()
    assert told.out == "" and told.err == "error: here.txt: No such file\n"


def test_json_is_all_there_is_on_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_output(as_json=True)
    console.console.print("result")
    console.print_json({"out": "slim"})
    assert json.loads(capsys.readouterr().out) == {"out": "slim"}
