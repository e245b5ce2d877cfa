"""Pictures as files: DOT text, what Graphviz draws of it, and a page in HTML, by the suffix of the file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pydot

from fxprune.dot.page import page
from fxprune.errors import ArgumentError, FxpruneError

__all__ = ["DRAWN", "SUFFIXES", "check_target", "write_picture"]

DRAWN = (".svg", ".png", ".pdf")
"""What Graphviz has to be there for."""

SUFFIXES = (".dot", ".gv", *DRAWN, ".html")
"""What a picture can be written as."""


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the file to write, where a picture can be written to it.

    Raises:
        ArgumentError: its suffix is none of a picture.
        FxpruneError: Graphviz is needed and not there, or there is no such folder.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"no picture is written as {target.suffix or 'a file without a suffix'}",
            where=str(target),
            remedy=f"End the name in one of {', '.join(SUFFIXES)}",
        )
    if target.suffix.lower() in DRAWN and shutil.which("dot") is None:
        raise FxpruneError(
            f"{target.suffix} is drawn by Graphviz, and there is no program dot here",
            where=str(target),
            remedy="Install the package graphviz of your system, or write .html or .dot",
        )
    if not target.parent.is_dir():
        raise _unwritable(target, "no such folder")
    return target


def write_picture(dot: pydot.Dot, title: str, target: Path) -> None:
    """Write ``dot`` to a file, in the format of its suffix.

    Args:
        dot: the picture.
        title: what it shows.
        target: a file that :func:`check_target` found to be one.

    Raises:
        FxpruneError: the file cannot be written, or Graphviz fails.
    """
    suffix, text = target.suffix.lower(), dot.to_string()
    if suffix in DRAWN:
        data = _drawn(text, suffix[1:])
    elif suffix == ".html":
        svg = None if shutil.which("dot") is None else _drawn(text, "svg").decode("utf-8")
        data = page(dot, title, svg).encode("utf-8")
    else:
        data = text.encode("utf-8")
    try:
        target.write_bytes(data)
    except OSError as error:
        raise _unwritable(target, str(error.strerror)) from error


def _drawn(text: str, form: str) -> bytes:
    """What Graphviz makes of DOT text."""
    command = [str(shutil.which("dot")), f"-T{form}"]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", errors="replace").strip().partition("\n")[0]
        raise FxpruneError(
            f"it failed: {said}", where="graphviz", remedy="Show less, by layer or group, or draw a .dot file by hand"
        )
    return done.stdout


def _unwritable(target: Path, why: str) -> FxpruneError:
    return FxpruneError(
        f"cannot be written: {why}",
        where=str(target),
        remedy="Choose a file in a folder that is there and can be written to",
    )
