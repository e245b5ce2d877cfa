"""Wrong uses of the command line, from the table in `wrong_uses.txt`: one line, exit code 2, and nothing written."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from tests.cli.folders import fill_with_wrong_things, save_tiny
from tests.cli.running import COMMAND
from tests.tiers import tiers

LINE = re.compile(r"(?P<arguments>[^#].*?) => (?P<words>.*)")


class WrongUse(NamedTuple):
    """Arguments of the command line, and words of the line that they end in."""

    arguments: str
    words: str


USES = [
    WrongUse(found["arguments"], found["words"])
    for line in Path(__file__).with_name("wrong_uses.txt").read_text(encoding="utf-8").splitlines()
    if (found := LINE.fullmatch(line))
]

ONLY_PRUNE = (
    *("no output is given", "no file of weights", "SafetensorError", "missing", "of another shape"),
    *("WordLevel", "kind vocab", "cut in memory", "sized in parameters", "rows of the vocabulary"),
)
"""Words of errors that a dry run does not raise: it reads no weight, needs no place, and takes no vocabulary."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with much that is none."""
    path = tmp_path_factory.mktemp("wrong")
    save_tiny(path / "model")
    fill_with_wrong_things(path)
    return path


def files_of(folder: Path) -> dict[Path, int]:
    """Every file and folder, with the time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def fault(result: Result, words: str) -> str:
    """How the end of a command differs from one line with these words; empty if it does not."""
    if not isinstance(result.exception, SystemExit) or result.exit_code != 2:
        return f"ended in {result.exit_code}: {result.exception!r}"
    *before, line = result.stderr.splitlines() or [""]
    if not line.startswith("error: ") or words not in line:
        return line
    others = [one for one in before if not one.endswith(" ...") and not one.startswith("warning: ")]
    return " / ".join([*others, result.stdout]).strip() if others or result.stdout else ""


def test_there_are_many_of_them() -> None:
    assert len({use.arguments for use in USES}) == len(USES) >= 300


def check_all(folder: Path, uses: list[WrongUse]) -> None:
    """Run commands in this process, and fail with all rows that end in another way."""
    before, wrong = files_of(folder), []
    for arguments, words in uses:
        found = fault(CliRunner().invoke(COMMAND, shlex.split(arguments)), words)
        if files_of(folder) != before:
            found, before = f"{found} and it wrote files", files_of(folder)
        if found:
            wrong.append(f"{arguments} => {words}\n    {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", tiers(range(3), 0))
@pytest.mark.timeout(900)
def test_each_ends_in_one_line_and_writes_nothing(part: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    check_all(folder, USES[part::3])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_refuses_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    prunes = [
        WrongUse(use.arguments.replace("prune ", "prune --dry-run ", 1), use.words)
        for use in USES
        if use.arguments.startswith("prune ") and not any(words in use.words for words in ONLY_PRUNE)
    ]
    check_all(folder, [use for use in prunes if use.arguments.count("--dry-run") == 1])
