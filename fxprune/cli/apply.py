"""The command that removes from a model what an earlier prune decided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli.console import Folder, Gguf, app, clear_errors, progress
from fxprune.cli.export import Quantization
from fxprune.cli.load import is_gguf, load_either
from fxprune.cli.naming import check_model
from fxprune.cli.plan import Source, read_plan
from fxprune.cli.prune import tell, write, write_file

__all__ = ["apply"]


@app.command()
def apply(
    model: Folder,
    plan: Source,
    out: Annotated[Path, typer.Option(help="Folder to write to, or a file: .gguf, .pt2 or .onnx.")],
    compensate: Annotated[str | None, typer.Option(help="least-squares: refit what stays; else nothing is.")] = None,
    tune: Annotated[str | None, typer.Option(help="tune, as in 'tune{epochs=2}'; else nothing is.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for these two: .txt, or .jsonl with 'text'; else built-in text.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples; else all, up to 1,024.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 128,
    norm: Annotated[
        str | None, typer.Option(help="Norms over units that go: masked or sliced; as the plan says, a .gguf: sliced.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Free dense tensors early: less memory.")] = False,
    gguf_file: Gguf = None,
    quantization: Quantization = None,
) -> None:
    """Remove from MODEL what PLAN says, made for it or for a sibling of its shape; write what `prune` writes."""
    with clear_errors():
        check_model(model, gguf_file, with_weights=True)
        decided = read_plan(plan).plan
        _check_out(out)
        windows = {"file": calibration, "samples": samples, "tokens": tokens}
        options: dict[str, Any] = {"compensate": compensate, "tune": tune, "inplace": in_place, "track": progress}
        options["norm"] = norm or ("sliced" if out.suffix == ".gguf" else None)  # it has one epsilon for all norms
        _run(model, decided, out, options, windows, gguf_file, quantization)


def _run(
    model: str,
    plan: fxprune.Plan,
    out: Path,
    options: dict[str, Any],
    windows: dict[str, Any],
    gguf_file: str | None,
    quantization: str | None,
) -> None:
    """Load, apply and write.

    Args:
        model: what the user named.
        plan: what goes.
        out: where to.
        options: of :func:`fxprune.apply`.
        windows: the calibration text, how many samples are taken of it, and how long they are.
        gguf_file: in the folder.
        quantization: of a GGUF file.
    """
    from fxprune.data.files import calibration_text, calibration_windows
    from fxprune.export.model import SUFFIXES

    file = windows["file"]
    text = None if file is None else calibration_text(file)
    reads = options["compensate"] or options["tune"] or (out.suffix == ".gguf" and not is_gguf(model))
    dense, tokenizer = load_either(model, gguf_file, with_tokenizer=bool(reads))
    data = None
    if text is not None:
        data = calibration_windows(tokenizer, text, windows["samples"], windows["tokens"], str(file))
    result = fxprune.apply(dense, plan, data, tokenizer=tokenizer, **options)
    made = write_file if out.suffix in SUFFIXES else write
    tell(result, out, loading=made(result, tokenizer, out, like=model, quantization=quantization))


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else, before any work.

    Raises:
        CheckpointError: it does.
    """
    from fxprune.checkpoint.write import check_place
    from fxprune.export.model import SUFFIXES

    if out.suffix not in SUFFIXES:
        check_place(out)
