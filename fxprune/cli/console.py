"""The command line application, where it prints to, and how errors end."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from fxprune.errors import FxpruneError

__all__ = ["Folder", "Gguf", "app", "clear_errors", "console", "errors", "progress"]

app = typer.Typer(add_completion=False, help="Structural pruning of language models.", no_args_is_help=True)
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

_LONGEST_ERROR = 600


def _tell_version(asked: bool) -> None:
    if asked:
        from fxprune import __version__

        console.print(f"fxprune {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structural pruning of language models."""


Folder = Annotated[str, typer.Argument(help="Model folder, id on a hub, or GGUF file.")]
Gguf = Annotated[str | None, typer.Option(help="GGUF file inside the folder.")]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End what is the user's to mend in one line and exit code 2."""
    try:
        yield
    except (FxpruneError, OSError) as error:
        text = textwrap.shorten(str(error), _LONGEST_ERROR, placeholder=" ...")
        errors.print(f"[red]error: {escape(text)}[/red]", highlight=False)
        raise typer.Exit(2) from error


def progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Show how far a pass is; of several processes the first one does."""
    from fxprune.data.ranks import is_first

    if not is_first():
        return items
    return track(items, what, total, console=errors, transient=True)
