"""Options of the commands: those declared by the library, and those of the command line alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fxprune.cli.config import parse_number, read_config
from fxprune.cli.console import option_name
from fxprune.errors import PassError
from fxprune.pipeline.arguments import Argument, read_spelling
from fxprune.recipes.options import DATA, MACHINE, OUTPUT, WHAT_GOES, option_table
from fxprune.recovery.settings import TRAINING

what_goes: Callable[..., Any] = partial(typer.Option, rich_help_panel=WHAT_GOES)
_data: Callable[..., Any] = partial(typer.Option, rich_help_panel=DATA)
_output: Callable[..., Any] = partial(typer.Option, rich_help_panel=OUTPUT)
_machine: Callable[..., Any] = partial(typer.Option, rich_help_panel=MACHINE)

_METAVARS = {"ratio": "N|KIND=N,...", "round_to": "N|KIND=N,...|auto", "kinds": "KIND,...", "protect": "N N"}


def expanded(path: Path | None) -> Path | None:
    """A path with the home folder in place of ``~``, which shells leave in ``--out=~/slim``."""
    return None if path is None else path.expanduser()


Folder = Annotated[str, typer.Argument(help="Model folder, hub id, GGUF file, or 'demo'.")]
Gguf = Annotated[str | None, _machine(help="GGUF file inside the folder.")]
Force = Annotated[bool, _output("--force", help="Write over what is there; other files in a folder stay.")]
Quiet = Annotated[bool, _output("--quiet", "-q", help="Print only errors.")]
QuietButResult = Annotated[bool, _output("--quiet", "-q", help="Print only the result and errors.")]
Verbose = Annotated[bool, _output("--verbose", "-v", help="Print each pass with its time as it runs.")]
Json = Annotated[bool, _output("--json", help="Print one JSON document, nothing else.")]
_DTYPE = "Dtype of the weights (default: that of the files)."
Dtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, _machine(help=_DTYPE)]
Device = Annotated[str | None, _machine(help="Device to compute on: cpu (the default), cuda, cuda:1, mps.")]
Out = Annotated[Path | None, _output(callback=expanded, help="Folder to write to, or a .gguf, .pt2 or .onnx file.")]
_CONFIG = "A run.yaml with any of the arguments; those on the command line win."
Config = Annotated[Path | None, what_goes(callback=read_config, is_eager=True, help=_CONFIG)]
DryRun = Annotated[bool, _output("--dry-run", help="Print what to expect, from the config alone, and write nothing.")]
GroupRatio = Annotated[float | None, typer.Option(hidden=True)]
Taylor = Annotated[str | None, typer.Option(hidden=True)]
_CALIBRATION = (
    "Text to calibrate on: a text file, rows in .json, .jsonl or .parquet, or a data set: wikitext2, c4, ptb, "
    "OWNER/NAME (default: built-in text); or a folder of images or .wav files, or rows in .jsonl that name some."
)
Calibration = Annotated[str | None, _data(help=_CALIBRATION)]
Samples = Annotated[int | None, _data(min=1, help="Number of calibration samples (default: chosen by the recipe).")]
Tokens = Annotated[int | None, _data(min=2, help="Tokens of a calibration sample (default: 128).")]
PushToHub = Annotated[str | None, _output(metavar="OWNER/NAME", help="Upload the folder to a repository of the hub.")]
LowMemory = Annotated[bool, _machine("--low-memory", help="Keep weights on disk; resume an interrupted run.")]
_TYPES = (
    "Type of a .gguf file: f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, ... (default: that of the GGUF file read, or f16)."
)
Quantization = Annotated[str | None, _output(help=_TYPES)]


def library_options(declaration: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace ``**options`` of a command by those of ``declaration`` with a panel, unless it has one of the same name.

    The command gets those that were given, parsed.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        every = option_table(declaration).items()
        table = {name: one for name, one in every if one[1].panel and name not in signature.parameters}

        @wraps(function)
        def command(**values: Any) -> None:
            for name, (hint, declared) in table.items():
                value = values.pop(name)
                if value not in (None, "None") and (value is not False or declared.default is True):
                    values[name] = _parse(hint, value)
            function(**values)

        added = [_parameter(name, *table[name]) for name in table]
        parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in sorted([*own, *added], key=_panel)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _panel(parameter: inspect.Parameter) -> int:
    """The place of a parameter in the help: arguments first, then the panels in order."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    panel = next((one.rich_help_panel for one in metadata if hasattr(one, "rich_help_panel")), None)
    return (None, TRAINING, WHAT_GOES, DATA, OUTPUT, MACHINE).index(panel)


def _parameter(name: str, hint: Any, declared: Argument) -> inspect.Parameter:
    """The parameter of a command for an option: words are choices, and anything but flags and words is text."""
    kinds, spelled, text = _kinds(hint), option_name(name), declared.doc.replace("`", "")
    shell_type: Any = str | None
    if declared.default is True:  # what is asked for is to leave it out
        shell_type, spelled = bool | None, f"{spelled}/{spelled.replace('--', '--no-')}"
    elif bool in kinds:
        shell_type = bool
    elif kinds in ({int}, {float}):
        shell_type = kinds.pop() | None
    elif tuple in kinds:
        shell_type = tuple[str, str] | None
    elif Literal in kinds:
        shell_type = hint
    if not isinstance(declared.default, bool | None):
        text = f"{text.removesuffix('.')} (default: {declared.default})."
    option = typer.Option(spelled, help=text, rich_help_panel=declared.panel, metavar=_METAVARS.get(name))
    default, hint = False if shell_type is bool else None, Annotated[shell_type, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _kinds(hint: Any) -> set[Any]:
    members = get_args(hint) if get_origin(hint) not in (None, Literal, tuple) else (hint,)
    return {get_origin(one) or one for one in members} - {type(None)}


def _parse(hint: Any, value: Any) -> Any:
    """The value of an option given as text; an unknown form is left for the library to refuse."""
    kinds = _kinds(hint)
    if isinstance(value, tuple):
        return tuple(map(parse_number, value))
    if not isinstance(value, str):
        return value
    if kinds & {Mapping, Sequence} and value[:1] in ("(", "[", "{"):
        with suppress(PassError):
            return read_spelling(f"option{{{value=!s}}}")[1]["value"]
    if Mapping in kinds and "=" in value:
        pairs = [pair.partition("=") for pair in value.split(",")]
        return {kind.strip(): parse_number(number) for kind, _, number in pairs}
    if Mapping in kinds:
        return parse_number(value)
    return [kind.strip() for kind in value.split(",")] if Sequence in kinds else value
