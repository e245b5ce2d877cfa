"""The place that a result goes to, checked before any work. It needs no torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from fxprune.cli.config import run_file
from fxprune.errors import CheckpointError, UnknownNameError
from fxprune.pipeline.arguments import MANIFEST, SUFFIXES

__all__ = ["at_home", "check_output", "is_file"]

_FILES = (".bin", ".ckpt", ".h5", ".json", ".pt", ".pth", ".safetensors", ".tar", ".txt", ".yaml", ".zip")
"""How names of files end that this package does not write; folders may have dots in their names."""


def is_file(out: Path) -> bool:
    """Return whether a name means a file, and not a folder."""
    return out.suffix in SUFFIXES


def at_home(path: Path | None) -> Path | None:
    """Return a path with the folder of the user in place of ``~``, which shells leave in ``--out=~/slim``."""
    return None if path is None else path.expanduser()


def check_output(out: Path, model: str, *, force: bool) -> None:
    """Refuse a place that cannot be written to, or holds what would be lost.

    Args:
        out: the place.
        model: what is pruned; it is never written over.
        force: whether what someone else put there may be replaced.

    Raises:
        UnknownNameError: the suffix is of a file that is not written here.
        CheckpointError: says what is in the way.
    """
    _check_suffix(out.suffix)
    _check_name(out)
    if out.exists() and Path(model).exists() and out.samefile(Path(model)):
        raise CheckpointError("it is the model itself", where=str(out), remedy="Choose another place")
    _check_parents(out)
    if is_file(out):
        _check_file(out, force=force)
    else:
        _check_folder(out, force=force)


def _check_suffix(suffix: str) -> None:
    known = (*SUFFIXES, *_FILES)
    near = suffix[1:].isalpha() and difflib.get_close_matches(suffix.lower(), SUFFIXES, cutoff=0.7)
    if suffix not in SUFFIXES and (suffix.lower() in known or near):
        raise UnknownNameError("suffix", suffix, SUFFIXES)


def _check_name(out: Path) -> None:
    """Refuse a name that nothing can have, or where links lead in a circle."""
    if str(out).startswith("-"):
        remedy = "Give --out a name before it, or a path such as ./-slim if that is what is meant"
        raise CheckpointError("it is spelled like an option", where=str(out), remedy=remedy)
    try:
        out.stat()
    except (FileNotFoundError, NotADirectoryError):  # a folder on the way that is a file is told with its name
        return
    except (OSError, ValueError) as error:
        what = f"nothing can be written there: {getattr(error, 'strerror', '') or error}"
        raise CheckpointError(what, where=str(out), remedy="Choose another place") from error
    if not out.is_dir() and not out.is_file():
        raise CheckpointError("it is neither a folder nor a file", where=str(out), remedy="Choose another place")


def _check_parents(out: Path) -> None:
    """Refuse a place whose folder is none, or cannot be written to."""
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is a file", where=str(out), remedy="Choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"nothing can be written in {parent}", where=str(out), remedy="Choose another folder")


def _check_file(out: Path, *, force: bool) -> None:
    if out.is_dir():
        raise CheckpointError("it is a folder", where=str(out), remedy="Name a file in it")
    ours = run_file(out, is_file=True).exists()
    if out.exists() and not ours and not force:
        raise CheckpointError(
            "there is such a file, and no run of this command beside it",
            where=str(out),
            remedy="Choose another name, or replace it with --force",
        )


def _check_folder(out: Path, *, force: bool) -> None:
    if out.is_file():
        raise CheckpointError("is a file", where=str(out), remedy="Choose a folder, or a name that ends in .gguf")
    ours = (out / MANIFEST).is_file() or run_file(out, is_file=False).is_file()
    if not out.is_dir() or ours or not any(out.iterdir()):
        return
    if not force:
        raise CheckpointError(
            "it holds files that are not of an earlier run",
            where=str(out),
            remedy="Choose a new folder, or write into this one with --force",
        )
    if out.resolve() == Path.cwd() or any(path.is_dir() for path in out.iterdir()):
        raise CheckpointError(
            "it holds folders or is where you are, and is not replaced with --force either",
            where=str(out),
            remedy="Choose a new folder",
        )
