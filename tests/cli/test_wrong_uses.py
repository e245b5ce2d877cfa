"""Wrong uses of the command line, from the list in `wrong_uses.txt`: one line, exit code 2, and nothing written."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxprune.cli import app
from tests.cli.folders import fill_with_wrong_things, save_tiny
from tests.cli.uses import USES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with much that is none."""
    path = tmp_path_factory.mktemp("wrong")
    save_tiny(path / "model")
    fill_with_wrong_things(path)
    return path


def seen(folder: Path) -> dict[Path, int]:
    """Every file and folder, with when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_there_are_many_of_them() -> None:
    assert len({use.arguments for use in USES}) == len(USES) >= 300
    assert sum(not use.at_once for use in USES) <= len(USES) / 10


def test_those_that_are_told_at_once_need_no_torch(folder: Path) -> None:
    command = [sys.executable, "-m", "tests.cli.uses", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize(("arguments", "says"), [use[:2] for use in USES], ids=[use.arguments for use in USES])
def test_it_ends_in_one_line(folder: Path, arguments: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = seen(folder)
    result = CliRunner().invoke(app, shlex.split(arguments))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    *before_it, line = result.stderr.splitlines()
    assert line.startswith("error: ") and says in line, result.stderr
    assert all(told.endswith(" ...") for told in before_it), "nothing but progress"
    assert "Traceback" not in result.output and result.stdout == ""
    assert seen(folder) == before


LOOKS_LESS = (
    "there is no place to write to",  # it writes nothing
    "no file of weights",  # a config is enough
    "SafetensorError",
    "is missing. Fetch it",
    "is of another shape",
)
"""Words of the lines that a dry run has no reason to end in: it reads no weight, and needs no place."""

PRUNES = [
    use.arguments
    for use in USES
    if use.arguments.startswith("prune ")
    and "--dry-run" not in use.arguments
    and not any(words in use.says for words in LOOKS_LESS)
]


@pytest.mark.parametrize("arguments", PRUNES)
def test_a_dry_run_ends_in_the_same_line(folder: Path, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It went well where the prune refused a text that is too short, a tokenizer, a device, or a file of a pass."""
    monkeypatch.chdir(folder)
    before, given = seen(folder), shlex.split(arguments)
    pruned, dry = (CliRunner().invoke(app, words) for words in (given, [given[0], "--dry-run", *given[1:]]))
    assert dry.exit_code == pruned.exit_code == 2, dry.output
    assert dry.stdout == "" and dry.stderr.splitlines()[-1] == pruned.stderr.splitlines()[-1]
    assert seen(folder) == before
