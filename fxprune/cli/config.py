"""Runs as files: `run.yaml` holds the arguments of a prune, and is read in place of flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from fxprune.cli.console import clear_errors
from fxprune.cli.wording import option
from fxprune.errors import FxpruneError, UnknownNameError

__all__ = ["read_config", "run_file", "spelled_run"]

_REMEDY = "Give a YAML file with an argument on each line, as in 'ratio: 0.2'"

_ITSELF = "config"
"""The argument that names the file, which no file says."""

_UNWRITTEN = ("config", "dry_run", "force", "quiet", "verbose", "as_json")
"""Arguments that say how a run is looked at, and not what it does."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let arguments that are not given on the command line be those of a file.

    Raises:
        Exit: there is no such file, or it says something that no argument stands for.
    """
    if path is not None:
        with clear_errors():
            known = {_key(parameter): parameter for parameter in context.command.params if parameter.name != _ITSELF}
            context.default_map = {
                known[key].name: _as_typed(path, key, value, flag=getattr(known[key], "is_flag", False))
                for key, value in _said(path, known).items()
                if value is not None
            }
    return path


def run_file(out: Path, *, is_file: bool) -> Path:
    """Return where the arguments of a run are written: in its folder, or beside its file."""
    return out.with_suffix(".run.yaml") if is_file else out / "run.yaml"


def spelled_run(arguments: Mapping[str, Any]) -> str:
    """Return a run as YAML: each argument that was given, by the name of its option."""
    import yaml

    plain = {
        option(name)[2:]: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in arguments.items()
        if name not in _UNWRITTEN and value is not None and value is not False
    }
    head = "# Repeats the run: fxprune prune --config run.yaml, from the folder in which it was started.\n"
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return head + text


def _said(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a file, each of which is an argument."""
    found, keys = _read(path)
    if not isinstance(found, dict):
        what = "it is empty" if found is None else f"it holds a {type(found).__name__}"
        raise FxpruneError(what, where=str(path), remedy=_REMEDY)
    for key in keys:
        if key not in known:
            raise UnknownNameError(f"entry of {path.name}", key, known)
        if keys.count(key) > 1:
            raise FxpruneError(f"it says {key} {keys.count(key)} times", where=str(path), remedy="Leave one of them")
    return {_dashed(key): value for key, value in found.items()}


def _read(path: Path) -> tuple[Any, list[str]]:
    """Return what a file holds, and the keys of its entries as they come: YAML keeps the last of two alike."""
    import yaml

    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise FxpruneError(what, where=str(path), remedy=_REMEDY)
    text = path.read_bytes()
    try:
        found, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise FxpruneError(f"it is not YAML: {error}", where=str(path), remedy=_REMEDY) from error
    entries = node.value if isinstance(node, yaml.MappingNode) else ()
    return found, [_dashed(key.value) for key, _ in entries]


def _dashed(key: Any) -> str:
    """Return a key as an option is spelled; both ways are read."""
    return str(key).replace("_", "-")


def _key(parameter: Any) -> str:
    """Return what an argument is called in a file: as its option is, without the dashes in front."""
    longest = max(parameter.opts, key=len)
    return str(longest.lstrip("-").replace("_", "-")).lower()


def _as_typed(path: Path, key: str, value: Any, *, flag: bool) -> Any:
    """Return a value as it would stand on a command line."""
    if isinstance(value, bool) and flag:
        return value
    if isinstance(value, bool):
        said, remedy = str(value).lower(), "Put words that YAML takes for it, as yes, no, on and off, into quotes"
        raise FxpruneError(f"{key} is {said}", where=str(path), remedy=remedy)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return [str(item) for item in value]
    if isinstance(value, str | int | float):
        return str(value)
    raise FxpruneError(f"{key} is a {type(value).__name__}", where=str(path), remedy=_REMEDY)
