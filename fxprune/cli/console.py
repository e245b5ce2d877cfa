"""The command line application: signals, standard output and error, progress, exit codes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table
from typer.core import TyperCommand, TyperGroup

from fxprune.errors import ArgumentError, FxpruneError

ONE_OF_TWO = "Leave one of the two out"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_state = {"exits": False, "since": 0.0, "swallowed": False}


def install() -> None:
    """Let Ctrl-C end the process with exit code 130, and SIGTERM with 143.

    Temporary files and folders are removed on the way out, so that a result is there as a whole or not at all.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # shells let background jobs ignore interrupts
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable


def finish() -> None:
    """Ignore signals from here on: a command whose work is done ends with its own exit code."""
    if not _state["since"]:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit without cleanup on a signal inside this context, for imports: C code swallows exceptions raised in them."""
    _state["exits"] = True
    try:
        yield
    finally:
        _state["exits"] = False


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Send the signal again if it arrived in a finaliser or a weakref callback, where nothing can be raised."""
    if not _state["since"] or not isinstance(found.exc_value, SystemExit):
        sys.__unraisablehook__(found)
        return
    _state["swallowed"] = True
    number = int(str(found.exc_value)) - 128
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _stop(number: int, frame: FrameType | None) -> None:
    if _state["swallowed"]:
        _state["swallowed"] = False
        raise SystemExit(128 + number)
    now = time.monotonic()
    if _state["since"] and now - _state["since"] < 5:  # further signals wait for the cleanup that the first one started
        return
    first, _state["since"] = not _state["since"], now
    if first:
        # not by a stream of Python, which may be in the middle of a write and cannot be entered twice
        os.write(2, b"\r\x1b[Kstopped\n" if sys.__stderr__ is not None and sys.__stderr__.isatty() else b"stopped\n")
    if _state["exits"] or not first:
        os._exit(128 + number)
    raise SystemExit(128 + number)


def keep_freed() -> bool:
    """Disable trimming in glibc's malloc; False on other allocators.

    By default each tensor above 32 MB, such as the logits of some hundred tokens, is a mapping of its own, which the
    system fills with zeros page by page: up to a quarter of the time of a training step on a CPU. Only for a process
    that has memory to spare and does little else.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # options of mallopt, from malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))  # no mappings, and a heap that never shrinks


console = Console(soft_wrap=True, markup=False)
"""Results; names of files and models may have brackets in them, which are no markup."""

errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
"""Why a command stopped."""

notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
"""Progress and remarks, which ``--quiet`` silences."""

_TOGETHER = ("prune", "sweep", "apply", "eval", "recover")
"""Commands whose work several processes share."""

_ORDER = (*_TOGETHER, "generate", "chat", "bench", "export", "serve", "graph", "explain", "plan", "recipes")
"""Commands in the order in which they are of use; others come last."""


def option_name(name: str) -> str:
    """The option of an argument: ``--group-ratio`` for ``group_ratio``."""
    return {"inplace": "--in-place", "offload": "--low-memory"}.get(name, f"--{name.replace('_', '-')}")


def is_given(context: Any, name: str) -> bool:
    """Whether a parameter has a value from the command line or a ``run.yaml``."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def pair_of(text: str) -> list[str]:
    """The two values in ``1,1`` or ``(1, 1)``; zeros for ``()``."""
    return re.findall(r"[^\s,()\[\]]+", text) or ["0", "0"]


class Command(TyperCommand):
    """A command whose errors end in one line and exit code 2; a defect in the package ends in a traceback."""

    is_measurement = False
    """Whether results are all that the command is for, so that ``--quiet`` still prints them."""
    needs_library = True
    """Whether the whole library is imported before the command runs."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for one in self.params:
            if one.param_type_name == "argument":  # in capitals, as in the first line of the help
                one.metavar = str(one.name).upper()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split a pair given as one word, ``1,1`` or ``(1, 1)``, into two words."""
        pairs = {name for one in self.params if one.nargs == 2 for name in one.opts}
        words: list[str] = []
        for word in args:
            name, equals, value = word.partition("=")
            if name in pairs and equals:
                words.append(name)
                word = value
            in_one = bool(words) and words[-1] in pairs and re.search(r"[,()\[\]]", word)
            words += pair_of(word) if in_one else [word]
        return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        """Configure the output, import the package, and run the command."""
        quiet, verbose, as_json = (bool(ctx.params.get(name)) for name in ("quiet", "verbose", "as_json"))
        set_output(quiet=quiet, verbose=verbose, as_json=as_json, with_results=self.is_measurement)
        try:
            if quiet and verbose:
                raise ArgumentError("cannot be given with --verbose", where="--quiet", remedy=ONE_OF_TWO)
            if ctx.command.name not in _TOGETHER and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                what, remedy = "it runs in one process", "Start it without torchrun"
                raise ArgumentError(what, where=f"fxprune {ctx.command.name}", remedy=remedy)
            if self.needs_library and "fxprune.api" not in sys.modules:
                with exit_on_signal(), working("starting"):
                    import fxprune.api  # noqa: F401
            return super().invoke(ctx)
        except FxpruneError as error:
            options = {parameter.name for parameter in self.params if parameter.param_type_name == "option"}
            if not is_given(ctx, error.argument):  # an argument of a pass may have the name of an option
                options.discard(error.argument)

            def spell(name: str) -> str:
                return option_name(name) if name in options or name == "offload" else name

            error.remedy = error.shell
            raise typer.Exit(_report(error.render(spell))) from error
        except OSError as error:  # before the base class takes a broken pipe for the end of the output
            raise typer.Exit(_report(_describe(error))) from error


class MeasuringCommand(Command):
    """A command whose output is its purpose."""

    is_measurement = True


class QuickCommand(Command):
    """Base class of commands that run no model and load no library up front."""

    needs_library = False


class _Commands(TyperGroup):
    """Commands in the order of use; wrong usage ends in one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands."""
        found = super().list_commands(ctx)
        return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def main(self, args: Any = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command, as :meth:`typer.core.TyperGroup.main` does."""
        extra["standalone_mode"] = False
        if not standalone_mode:
            return super().main(args, *more, **extra)
        try:
            code = super().main(args, *more, **extra)
        except typer.TyperException as error:
            code = _report(error.format_message())
        except FxpruneError as error:  # of a run.yaml, which is read with the arguments
            code = _report(str(error))
        except OSError as error:
            code = _report(_describe(error))
        raise SystemExit(code if isinstance(code, int) else 0)


app = typer.Typer(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(asked: bool) -> None:
    if asked:
        from fxprune import __version__

        console.print(f"fxprune {__version__}", highlight=False)
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback(invoke_without_command=True)
def options(context: typer.Context, version: _Version = False) -> None:
    """Structural pruning of language models."""
    set_output()
    if context.invoked_subcommand is None:
        console.print(context.get_help(), end="")


def _describe(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def _report(text: str) -> int:
    errors.print(f"error: {textwrap.shorten(text, 600, placeholder=' ...')}", style="red")
    return 2


def set_output(
    *, quiet: bool = False, verbose: bool = False, as_json: bool = False, with_results: bool = False
) -> None:
    """Choose the output: ``with_results`` keeps results in spite of ``quiet``; errors are printed in any case.

    Of several processes the first prints results and notes, and each its errors.
    """
    widened(console)
    console.quiet = as_json or (quiet and not with_results) or not is_first()
    notes.quiet = quiet or not is_first()
    logger = logging.getLogger("fxprune")
    logger.handlers = [_Lines()] if verbose else []
    logger.setLevel(logging.INFO if verbose else logging.NOTSET)


def is_first() -> bool:
    """Whether this process is the one that prints: of several of ``torchrun``, the first."""
    ranks = sys.modules.get("fxprune.offload.ranks")  # imported where there are several
    return ranks is None or bool(ranks.is_first())


def widened(console: Console) -> Console:
    """Make a console wide enough for whole names, unless it is a terminal or the environment sets a width."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200
    return console


def print_json(data: Any) -> None:
    """Print one JSON document, whatever ``--quiet`` silenced."""
    if is_first():
        typer.echo(json.dumps(data, indent=2))


def print_table(
    head: Iterable[str | Column], rows: Iterable[Iterable[str]], *, title: str | None = None, lined: bool = False
) -> None:
    """Print a table of results, with lines between its rows if ``lined``."""
    table = Table(*head, title=title, show_lines=lined)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_lines(lines: Iterable[str]) -> None:
    """Print results as they are, without markup or colours."""
    for line in lines:
        console.print(line, highlight=False)


class _Lines(logging.Handler):
    """Prints the log of the package."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        notes.print(record.getMessage())


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings as notes of one line, without file and line number."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        notes.print(f"note: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show a status while something of unknown duration runs."""
    if notes.quiet:
        yield
    elif notes.is_terminal:
        with notes.status(escape(what)):
            yield
    else:
        notes.print(f"{what} ...")
        yield


def progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Yield items and show how many are done and how long the rest takes."""
    if notes.quiet:
        yield from items
        return
    if notes.is_terminal:
        yield from track(items, escape(what), total, console=notes, transient=True)
        return
    start = time.monotonic()
    due = start + 2  # seconds
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now >= due:
            left = (now - start) / done * max(total - done, 0)
            notes.print(f"{what}: {done:,} of {total:,}, about {left:,.0f} s left")
            due = now + 10
        yield item


@contextlib.contextmanager
def run_progress(what: str) -> Iterator[dict[str, Any]]:
    """Options of a prune that show its progress: a bar in a terminal, occasional lines elsewhere."""
    if notes.is_terminal:
        yield {"progress": not notes.quiet}
        return
    with working(what):
        yield {"track": progress}
