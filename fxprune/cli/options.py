"""Options of the commands that prune: those of the library, from their one declaration, and those of a shell alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fxprune.cli.config import parse_number, read_config
from fxprune.cli.console import option_name
from fxprune.pipeline.arguments import Argument
from fxprune.recipes.options import DATA, MACHINE, OUTPUT, WHAT_GOES, option_table

__all__ = [
    "Calibration",
    "Config",
    "DryRun",
    "GroupRatio",
    "LowMemory",
    "Out",
    "Quantization",
    "Samples",
    "Taylor",
    "Tokens",
    "expanded",
    "library_options",
]

_PANELS = (WHAT_GOES, DATA, OUTPUT, MACHINE)

_METAVARS = {
    "ratio": "N|KIND=N,...",
    "round_to": "N|KIND=N,...|auto",
    "kinds": "KIND,...",
    "protect": "N N",
}


def expanded(path: Path | None) -> Path | None:
    """A path with the home folder in place of ``~``, which shells leave in ``--out=~/slim``."""
    return None if path is None else path.expanduser()


Out = Annotated[
    Path | None,
    typer.Option(callback=expanded, help="Folder to write to, or a .gguf, .pt2 or .onnx file.", rich_help_panel=OUTPUT),
]
Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="A run.yaml with any of the arguments; those on the command line win.",
        rich_help_panel=WHAT_GOES,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what to expect, from the config alone, and write nothing.", rich_help_panel=OUTPUT
    ),
]
GroupRatio = Annotated[float | None, typer.Option(hidden=True)]
Taylor = Annotated[str | None, typer.Option(hidden=True)]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Text to calibrate on: a text file, or rows in .json, .jsonl or .parquet (default: built-in text).",
        rich_help_panel=DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Number of calibration samples (default: chosen by the recipe).", rich_help_panel=DATA),
]
Tokens = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a calibration sample (default: 128).", rich_help_panel=DATA)
]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="Keep weights on disk; resume an interrupted run.", rich_help_panel=MACHINE),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Type of a .gguf file: f32, f16, bf16, q8_0, q4_0, ... (default: that of the GGUF file read, or f16).",
        rich_help_panel=OUTPUT,
    ),
]


def library_options(declaration: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace ``**options`` of a command by the options that ``declaration`` declares for a panel of the help.

    The command gets those that were given, parsed. One that it has itself keeps its own meaning.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        table = {
            name: (hint, declared)
            for name, (hint, declared) in option_table(declaration).items()
            if declared.panel and name not in signature.parameters
        }

        @wraps(function)
        def command(**values: Any) -> None:
            given = {name: values.pop(name) for name in table}
            options = {
                name: _parse(table[name][0], value)
                for name, value in given.items()
                if value is not None and value is not False
            }
            function(**values, **options)

        added = [_parameter(name, *table[name]) for name in table]
        parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in sorted([*own, *added], key=_panel)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _panel(parameter: inspect.Parameter) -> int:
    """The place of a parameter in the help: arguments first, then the panels in order."""
    options = [one for one in getattr(parameter.annotation, "__metadata__", ()) if hasattr(one, "rich_help_panel")]
    return _PANELS.index(options[0].rich_help_panel) if options and options[0].rich_help_panel else -1


def _parameter(name: str, hint: Any, declared: Argument) -> inspect.Parameter:
    """The parameter of a command for an option: words are choices, and anything but flags and words is text."""
    kinds = _kinds(hint)
    shell_type: Any = str | None
    if bool in kinds:
        shell_type = bool
    elif int in kinds and len(kinds) == 1:
        shell_type = int | None
    elif tuple in kinds:
        shell_type = tuple[str, str] | None
    elif Literal in kinds:
        shell_type = hint
    option = typer.Option(
        option_name(name),
        help=declared.doc.replace("`", ""),
        rich_help_panel=declared.panel,
        metavar=_METAVARS.get(name),
    )
    default = False if shell_type is bool else None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[shell_type, option]
    )


def _kinds(hint: Any) -> set[Any]:
    members = get_args(hint) if get_origin(hint) not in (None, Literal, tuple) else (hint,)
    return {get_origin(one) or one for one in members} - {type(None)}


def _parse(hint: Any, value: Any) -> Any:
    """The value of an option given as text; one that is not of a known form is left for the library to refuse."""
    kinds = _kinds(hint)
    if isinstance(value, tuple):
        return tuple(map(parse_number, value))
    if not isinstance(value, str):
        return value
    if Mapping in kinds and "=" in value:
        pairs = [pair.partition("=") for pair in value.split(",")]
        return {kind.strip(): parse_number(number) for kind, _, number in pairs}
    if Mapping in kinds:
        return parse_number(value)
    if Sequence in kinds:
        return [kind.strip() for kind in value.split(",")]
    return value
