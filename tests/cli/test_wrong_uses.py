"""Wrong uses of the command line, from the list in `wrong_uses.txt`: one line, exit code 2, and nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxprune.cli import app
from tests.cli.folders import fill_with_wrong_things, save_tiny

LINES = (Path(__file__).parent / "wrong_uses.txt").read_text(encoding="utf-8").splitlines()
USES = [tuple(line.split(" => ")) for line in LINES if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with much that is none."""
    path = tmp_path_factory.mktemp("wrong")
    save_tiny(path / "model")
    fill_with_wrong_things(path)
    return path


def seen(folder: Path) -> dict[Path, int]:
    """Every file and folder, with when it was changed."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_there_are_many_of_them() -> None:
    assert len({arguments for arguments, _ in USES}) == len(USES) >= 150


@pytest.mark.parametrize(("arguments", "says"), USES, ids=[arguments for arguments, _ in USES])
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
