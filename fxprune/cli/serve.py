"""The command that serves a model to other programs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.console import Command, app, print_lines, warnings_as_notes, working
from fxprune.cli.models import check_model, is_gguf, load, load_words
from fxprune.cli.output import check_quantization, gguf_options
from fxprune.errors import ArgumentError, FxpruneError

_CONTEXT = "Tokens of a request and its answer together."
_DRAFT = (
    "Smaller model with the same tokens, such as MODEL pruned, for speculative decoding; the answers stay the same."
)


@app.command(cls=Command)
def serve(
    model: flags.Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    context: Annotated[int, typer.Option(min=16, max=2**31 - 1, help=_CONTEXT)] = 4096,
    draft: Annotated[str | None, typer.Option(help=_DRAFT)] = None,
    quantization: flags.Quantization = None,
    quiet: flags.Quiet = False,
) -> None:
    """Serve MODEL over the OpenAI API until Ctrl-C; a model that is not a GGUF file is exported to one first."""
    from fxprune.export.gguf.format import load_data

    engine: dict[str, Any] = load_data("quantizations")["engine"]
    if find_spec(engine["server"]) is None:
        what = f"it is served by {engine['name']}, which is not installed"
        raise FxpruneError(what, where="serve", remedy=engine["install"])
    given = [one for one in (model, draft) if one is not None]
    if quantization is not None and all(map(is_gguf, given)):
        remedy = "Leave it out; `fxprune export` writes a file of another type"
        raise ArgumentError(f"{model} has its own", where="--quantization", remedy=remedy)
    for one in given:
        if not is_gguf(one):
            check_model(one, with_weights=True)
            check_quantization(quantization, Path("served.gguf"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            places = (Path(folder, role) for role in ("model", "draft"))
            paths = [_as_gguf(one, place, quantization) for one, place in zip(given, places, strict=False)]
            with working(f"starting {engine['name']}"):
                start = partial(start_server, engine["server"], *paths, host=host, port=port, context=context)
                server = ThreadPoolExecutor(1).submit(start).result()  # in a thread: signals are heard meanwhile
            print_lines([f"serving {model} at {server.listening_address}/v1; stop it with Ctrl-C"])
            wait()
    except SystemExit as stopped:  # at once, without waiting for threads of the engine, which may be loading a file
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(str(stopped.code)))


def _as_gguf(model: str, folder: Path, quantization: str | None) -> Path:
    """The GGUF file of a model, of its name: itself, or written into a new folder."""
    if is_gguf(model):
        return Path(model).expanduser()
    folder.mkdir()
    options = gguf_options(model, load_words(model), quantization)
    loaded = load(model)
    with working("writing a GGUF file"), warnings_as_notes():
        return fxprune.export_model(loaded, folder / f"{Path(model).name}.gguf", **options)


def start_server(package: str, path: Path, draft: Path | None = None, *, host: str, port: int, context: int) -> Any:
    """Start the server of a package in threads of this process; it stops with the object that is returned.

    A ``draft`` is the file of a smaller model that drafts tokens for the other to accept.

    Raises:
        FxpruneError: it cannot load the file, or cannot listen there.
    """
    engine = importlib.import_module(package)
    settings = engine.CommonParams()
    settings.model.path, settings.n_ctx = str(path), context
    settings.hostnames, settings.port, settings.verbosity = [host], port, 0
    if draft is not None:
        settings.speculative.types = [engine.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        settings.speculative.draft.mparams.path = str(draft)
    try:
        return engine.Server(settings)
    except RuntimeError as error:
        remedy = "Choose another --host or --port, or a file of an architecture that the engine knows"
        raise FxpruneError(f"it cannot be served: {error}", where=path.name, remedy=remedy) from error


def wait() -> None:
    """Wait for a signal."""
    if hasattr(signal, "pause"):
        signal.pause()
    threading.Event().wait()
