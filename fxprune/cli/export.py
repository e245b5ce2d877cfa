"""The command that writes a model as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.console import Command, app, print_lines, warnings_as_notes
from fxprune.cli.models import check_model, is_gguf, load, load_words
from fxprune.cli.output import check_output, check_quantization, gguf_options, runners
from fxprune.errors import ArgumentError

_OUT = "File to write: .gguf, .pt2 or .onnx."
_CALIBRATION = (
    "Text for the importance matrix of K-quants and i-quants: a file or data set, as for prune (default: built-in "
    "text)."
)


@app.command(cls=Command)
def export(
    model: flags.Folder,
    out: Annotated[Path, typer.Argument(callback=flags.expanded, help=_OUT)],
    quantization: flags.Quantization = None,
    like: Annotated[Path | None, typer.Option(help="GGUF file of the dense model: its tokenizer is copied.")] = None,
    calibration: Annotated[str | None, typer.Option(help=_CALIBRATION)] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Give a .pt2 or .onnx file a key-value cache.")] = False,
    gguf_file: flags.Gguf = None,
    quiet: flags.Quiet = False,
) -> None:
    """Write MODEL, pruned or not, as one file that runs without this package."""
    from fxprune.data.text import calibration_text
    from fxprune.export.model import check_options

    to_gguf = out.suffix == ".gguf"
    check_model(model, gguf_file, with_weights=True)
    check_options(out, cache=cache, like=like, quantization=quantization, calibration=calibration)
    check_output(out, model, force=True)  # an existing file is replaced when the new one is complete
    check_quantization(quantization, out)
    if like is not None and not is_gguf(str(like)):
        raise ArgumentError(f"{like} is not a GGUF file", where="--like", remedy="Name that of the dense model")
    tokenizer = load_words(model, gguf_file) if to_gguf and like is None else None
    if calibration is not None:
        calibration_text(calibration)  # refuses a text that cannot be read before the model is loaded
    loaded = load(model, gguf_file)
    options: dict[str, Any] = {"quantization": quantization, "like": like}
    if to_gguf and like is None:
        options = gguf_options(model, tokenizer, quantization)
    with warnings_as_notes():
        fxprune.export_model(loaded, out, calibration=calibration, cache=cache, **options)
    print_lines([f"{out} written: {runners(out)}"])
