"""Runs as files: `run.yaml` holds the arguments of a prune, and is read in place of options."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from fxprune.cli.console import is_given, pair_of
from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import SUFFIXES

_REMEDY = "Give a YAML file with an argument on each line, as in 'ratio: 0.2'"

_UNWRITTEN = ("config", "dry_run", "force", "quiet", "verbose", "as_json")
"""Arguments that do not change the result."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read arguments that are not on the command line from a file."""
    if path is None:
        return None
    import yaml

    known = {_key(parameter): parameter for parameter in context.command.params if parameter.name != "config"}
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise FxpruneError(what, where=str(path), remedy=_REMEDY)
    text = path.read_bytes()
    try:
        found, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise FxpruneError(f"it is not YAML: {error}", where=str(path), remedy=_REMEDY) from error
    if not isinstance(found, dict):
        what = "it is empty" if found is None else f"it holds a {type(found).__name__}"
        raise FxpruneError(what, where=str(path), remedy=_REMEDY)
    keys = [_dashed(key.value) for key, _ in node.value]  # of two entries with one key, safe_load keeps the last
    for key in keys:
        if key not in known:
            raise UnknownNameError(f"entry of {path.name}", key, known)
        if keys.count(key) > 1:
            raise FxpruneError(f"{key} is there {keys.count(key)} times", where=str(path), remedy="Leave one of them")
    given = {_dashed(key): value for key, value in found.items() if value is not None}
    context.default_map = {str(known[key].name): _as_text(path, key, given[key], known[key]) for key in given}
    return path


def is_file(out: Path) -> bool:
    """Whether a name means a file rather than a folder."""
    return out.suffix in SUFFIXES


def run_file(out: Path) -> Path:
    """The file for the arguments of a run: in its folder, or beside its file."""
    return out.with_suffix(".run.yaml") if is_file(out) else out / "run.yaml"


def format_run(context: Any) -> str:
    """The run of a command as YAML: each argument that was given, by the name of its option."""
    import yaml

    given = {
        _key(parameter): _plain(context.params[parameter.name])
        for parameter in context.command.params
        if parameter.name not in _UNWRITTEN and is_given(context, parameter.name)
    }
    head = "# Repeats the run: fxprune prune --config run.yaml, from the folder in which it was started.\n"
    return head + str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """A value as YAML writes it; a number that was given as text is a number, unless it would be written otherwise."""
    if isinstance(value, tuple):
        return list(map(_plain, value))
    if isinstance(value, Path):
        return str(value)
    number = parse_number(value) if isinstance(value, str) else value
    return number if str(number) == value else value


def parse_number(text: str) -> int | float | str:
    """A text as a number if it is one, else as it is."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _dashed(key: Any) -> str:
    return str(key).replace("_", "-")


def _key(parameter: Any) -> str:
    return _dashed(max(parameter.opts, key=len).lstrip("-")).lower()


def _as_text(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value as it would stand on a command line."""
    if isinstance(value, bool) and getattr(parameter, "is_flag", False):
        return value
    if isinstance(value, str | list) and parameter.nargs == 2:
        return pair_of(str(value))
    if isinstance(value, bool):
        remedy = "Put words that YAML takes for it, as yes, no, on and off, into quotes"
        raise FxpruneError(f"{key} is {str(value).lower()}", where=str(path), remedy=remedy)
    if isinstance(value, dict) and value:
        return ",".join(f"{kind}={number}" for kind, number in value.items())
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return [str(item) for item in value]
    if isinstance(value, str | int | float):
        return str(value)
    raise FxpruneError(f"{key} is a {type(value).__name__}", where=str(path), remedy=_REMEDY)
