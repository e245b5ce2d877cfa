"""The command line application: where it prints to, options that commands share, progress, and how errors end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from typer.core import TyperGroup

from fxprune.cli.naming import check_exists
from fxprune.cli.wording import in_options
from fxprune.errors import FxpruneError

__all__ = [
    "Device",
    "Dtype",
    "Folder",
    "Force",
    "Gguf",
    "Json",
    "Quiet",
    "QuietButResult",
    "Verbose",
    "app",
    "clear_errors",
    "console",
    "errors",
    "notes",
    "print_json",
    "progress",
    "set_output",
    "widened",
    "working",
]

_LONGEST_ERROR = 600

_FIRST_LINE, _NEXT_LINE = 2.0, 10.0
"""Seconds until a piped output is told how far something is, and between two such lines."""

_WIDTH_OF_FILES = 200
"""Characters of a line of a table that goes to a file or a pipe: names stay whole, to be searched and copied."""

console = Console(soft_wrap=True)
"""Where results go."""

errors = Console(stderr=True, soft_wrap=True)
"""Where it is said why a command stopped."""

notes = Console(stderr=True, soft_wrap=True)
"""Where progress and remarks go; ``--quiet`` silences it."""

Gguf = Annotated[str | None, typer.Option(help="GGUF file inside the folder.")]
Force = Annotated[bool, typer.Option("--force", help="Write where something else is; other files are kept.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.")]
QuietButResult = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the result and errors alone: no progress and no remarks.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print each pass with its time as it runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; else that of the files.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps; cpu by default.")]


_ORDER = ("prune", "apply", "eval", "recover", "generate", "bench", "export", "graph", "explain", "plan", "recipes")
"""Commands in the order in which they are of use; others come last."""


class _Commands(TyperGroup):
    """Commands whose wrong uses end in one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of use."""
        found = super().list_commands(ctx)
        return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command, as :meth:`typer.core.TyperGroup.main` does."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.TyperException as error:
            code = _refuse(error.format_message())
        raise SystemExit(code if isinstance(code, int) else 0)


app = typer.Typer(add_completion=False, cls=_Commands)


def _tell_version(asked: bool) -> None:
    if asked:
        from fxprune import __version__

        console.print(f"fxprune {__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structural pruning of language models."""
    set_output()
    if context.invoked_subcommand is None:
        console.print(context.get_help(), end="")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End what is the user's to mend in one line and exit code 2."""
    try:
        yield
    except FxpruneError as error:
        raise typer.Exit(_refuse(in_options(str(error), error.where, _option_names()))) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise typer.Exit(_refuse(f"{place}{error.strerror or error}")) from error


def _option_names() -> set[str]:
    """The names of the options of all commands, as functions have them; what is given by its place is none."""
    commands = typer.main.get_group(app).commands.values()
    told = (parameter for command in commands for parameter in command.params)
    return {one.name for one in told if one.name and one.param_type_name == "option"}


def _refuse(text: str) -> int:
    """Say in one line what is wrong, and return the exit code."""
    line = textwrap.shorten(text, _LONGEST_ERROR, placeholder=" ...")
    errors.print(f"[red]error: {escape(line)}[/red]", highlight=False)
    return 2


def _exists(model: str) -> str:
    with clear_errors():
        check_exists(model)
    return model


Folder = Annotated[
    str, typer.Argument(metavar="MODEL", callback=_exists, help="Model folder, id on a hub, GGUF file, or 'demo'.")
]


def set_output(*, quiet: bool = False, verbose: bool = False, as_json: bool = False, results: bool = False) -> None:
    """Choose what is printed; errors always are.

    Args:
        quiet: no progress, and no results but with ``results``.
        verbose: each pass with its time.
        as_json: no results but what :func:`print_json` prints.
        results: whether results are all that a command is for, so that ``quiet`` leaves them.
    """
    widened(console)
    console.quiet = as_json or (quiet and not results)
    notes.quiet = quiet
    logger = logging.getLogger("fxprune")
    logger.handlers = [_Lines()] if verbose else []
    logger.setLevel(logging.INFO if verbose else logging.NOTSET)


def widened(console: Console) -> Console:
    """Return a console whose tables are wide enough for whole names where they go to a pipe or a file.

    Args:
        console: given another width if it is no terminal and the environment says none.
    """
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console


def print_json(data: Any) -> None:
    """Print one JSON document, whatever :func:`set_output` silenced."""
    typer.echo(json.dumps(data, indent=2))


class _Lines(logging.Handler):
    """Prints what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one line."""
        notes.print(record.getMessage(), markup=False, highlight=False)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is being done of which nobody knows how long it takes."""
    if not _is_told():
        yield
    elif notes.is_terminal:
        with notes.status(what):
            yield
    else:
        notes.print(f"{what} ...", markup=False, highlight=False)
        yield


def progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Show how far something is and how long it takes; of several processes the first one does."""
    if not _is_told():
        return items
    if notes.is_terminal:
        return track(items, what, total, console=notes, transient=True)
    return _with_lines(items, what, total)


def _with_lines(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Yield items and print a line now and then, for an output that is no terminal."""
    start = time.monotonic()
    due = start + _FIRST_LINE
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now >= due:
            left = (now - start) / done * max(total - done, 0)
            notes.print(f"{what}: {done:,} of {total:,}, about {left:,.0f} s left", markup=False, highlight=False)
            due = now + _NEXT_LINE
        yield item


def _is_told() -> bool:
    """Whether progress is shown: of several processes of ``torchrun`` by the first, which is told without torch."""
    return not notes.quiet and os.environ.get("RANK", "0") == "0"
