"""The command that writes a model as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli.checks import check_quantization
from fxprune.cli.console import Folder, Gguf, Quiet, app, clear_errors, console, set_output
from fxprune.cli.load import is_gguf, load_either
from fxprune.cli.naming import check_model
from fxprune.cli.place import at_home, check_output
from fxprune.cli.wording import option
from fxprune.errors import ArgumentError, UnknownNameError
from fxprune.pipeline.arguments import SUFFIXES

__all__ = ["Quantization", "export", "gguf_options", "runs"]

Quantization = Annotated[
    str | None,
    typer.Option(
        help="Of a .gguf file: f32, f16, bf16, q8_0, q4_0, ...; else as in the GGUF file it is made of, or f16."
    ),
]


@app.command()
def export(
    model: Folder,
    out: Annotated[Path, typer.Argument(callback=at_home, help="File to write: .gguf, .pt2 or .onnx.")],
    quantization: Quantization = None,
    like: Annotated[Path | None, typer.Option(help="GGUF file of the dense model: its tokenizer is copied.")] = None,
    cache: Annotated[bool, typer.Option("--cache", help="A .pt2 or .onnx file that takes and gives a cache.")] = False,
    gguf_file: Gguf = None,
    quiet: Quiet = False,
) -> None:
    """Write MODEL, pruned or not, as one file that runs without this package."""
    with clear_errors():
        set_output(quiet=quiet)
        check_model(model, gguf_file, with_weights=True)
        _check(model, out, quantization=quantization, like=like, cache=cache)
        gguf = out.suffix == ".gguf"
        loaded, tokenizer = load_either(model, gguf_file, with_tokenizer=gguf and like is None)
        options: dict[str, Any] = {"quantization": quantization, "like": like}
        if gguf and like is None:
            options = gguf_options(model, tokenizer, quantization)
        fxprune.export_model(loaded, out, cache=cache, **options)
        console.print(f"{out} written: {runs(out)}", markup=False, highlight=False)


def _check(model: str, out: Path, *, cache: bool, **of_gguf: Any) -> None:
    """Refuse a file that cannot be written, and options that mean nothing to its kind, before anything is imported."""
    if out.suffix not in SUFFIXES:
        raise UnknownNameError("suffix", out.suffix, SUFFIXES)
    check_output(out, model, force=True)  # a file that is there is replaced when the new one is complete
    if out.suffix == ".gguf" and cache:
        raise ArgumentError(
            "--cache is for .pt2 and .onnx files", where="--cache", remedy="Leave it out: GGUF files have it always"
        )
    for name, value in of_gguf.items():
        if value is not None and out.suffix != ".gguf":
            raise ArgumentError(
                f"{option(name)} is for GGUF files", where=option(name), remedy=f"Leave it out with {out.name}"
            )
    check_quantization(of_gguf["quantization"], out)
    like = of_gguf["like"]
    if like is not None and not is_gguf(str(like)):
        raise ArgumentError(
            f"--like is {like}, which is no GGUF file", where="--like", remedy="Name the .gguf file of the dense model"
        )


def gguf_options(source: str, tokenizer: Any, quantization: str | None) -> dict[str, Any]:
    """Return how a GGUF file is written: like the one that the model was read from, if it was.

    Args:
        source: what the user named.
        tokenizer: of the model.
        quantization: what the user asked for.
    """
    from fxprune.export.gguf.write import type_in

    if not is_gguf(source):
        return {"tokenizer": tokenizer, "quantization": quantization}
    return {"like": source, "quantization": quantization or type_in(source)}


def runs(out: Path) -> str:
    """Return what runs a file, by its suffix."""
    return {
        ".gguf": "programs that read GGUF files run it",
        ".onnx": "onnxruntime runs it",
        ".pt2": "torch.export.load runs it",
    }[out.suffix]
