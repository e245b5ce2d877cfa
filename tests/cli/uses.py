"""The list of wrong uses; run with a folder, it tries those that are told without torch, and prints what fails.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, NamedTuple

_LINES = (Path(__file__).parent / "wrong_uses.txt").read_text(encoding="utf-8").splitlines()
_LINE = re.compile(r"(?P<arguments>.*?) (?P<arrow>=+>) (?P<says>.*)")


class Use(NamedTuple):
    """A wrong use.

    Args:
        arguments: of the command line.
        says: words of the one line that it ends in.
        at_once: whether it is told without torch.
    """

    arguments: str
    says: str
    at_once: bool


USES = [
    Use(found["arguments"], found["says"], found["arrow"] == "=>")
    for line in _LINES
    if not line.startswith("#") and (found := _LINE.fullmatch(line))
]


class _Bar(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("torch", "transformers"):
            raise AssertionError(f"{name} is imported")


def main(folder: str) -> None:
    """Print the uses that are not told without torch."""
    sys.meta_path.insert(0, _Bar())
    from typer.testing import CliRunner

    from fxprune.cli import app

    os.chdir(folder)
    for use in USES:
        if use.at_once:
            result = CliRunner().invoke(app, shlex.split(use.arguments))
            if not isinstance(result.exception, SystemExit) or use.says not in result.stderr:
                print(f"{use.arguments}: {result.exception}")


if __name__ == "__main__":
    main(sys.argv[1])
