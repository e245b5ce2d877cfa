"""The options of a prune, each with its type and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli.config import read_config
from fxprune.cli.place import at_home

__all__ = [
    "Calibration",
    "Compensate",
    "Config",
    "DryRun",
    "GroupRatio",
    "Importance",
    "InPlace",
    "Kinds",
    "LowMemory",
    "Norm",
    "Out",
    "Protect",
    "Quantization",
    "Ranking",
    "Ratio",
    "Recipe",
    "Reduction",
    "RoundTo",
    "Samples",
    "Seed",
    "Taylor",
    "Tokens",
    "Tune",
    "Uniform",
]

Out = Annotated[
    Path | None, typer.Option(callback=at_home, help="Folder to write to, or a file: .gguf, .pt2 or .onnx.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config, is_eager=True, help="A run.yaml with any of the arguments; those given here win."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what to expect, by the config alone; write nothing.")]
Recipe = Annotated[
    str | None,
    typer.Option(help="balanced (the default), fast, best, llm-pruner or a .txt file; see `fxprune recipes`."),
]
Ratio = Annotated[float | None, typer.Option(help="Fraction of the parameters to remove; 0.2 by default.")]
GroupRatio = Annotated[float | None, typer.Option(help="Fraction of each group's units, instead.")]
Kinds = Annotated[str | None, typer.Option(help="Comma-separated kinds, as in 'mlp,head'.")]
Importance = Annotated[
    str | None,
    typer.Option(
        help="taylor, l2, ..., as in 'taylor{order=second}'; without --recipe nothing is then fitted or tuned."
    ),
]
Taylor = Annotated[str | None, typer.Option(help="Order of taylor: vector, first, second or mix.")]
Reduction = Annotated[str | None, typer.Option(help="sum, prod, max, mean, first or last.")]
Ranking = Annotated[str | None, typer.Option(help="local (in each group) or global.")]
Protect = Annotated[tuple[int, int] | None, typer.Option(help="Layers kept whole in front and at the end.")]
RoundTo = Annotated[
    str | None,
    typer.Option(help="Widths stay multiples of this, or auto; MLPs of 32 by default in a .gguf file, else 1."),
]
Uniform = Annotated[bool, typer.Option("--uniform", help="Equal layers, for a stock checkpoint.")]
Norm = Annotated[
    str | None,
    typer.Option(help="Norms over units that go: masked, as with these zeroed, or sliced; a .gguf file: sliced."),
]
Compensate = Annotated[str | None, typer.Option(help="least-squares: refit what stays; none: do not.")]
Tune = Annotated[str | None, typer.Option(help="tune, as in 'tune{epochs=2}', or none.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Text to calibrate on, or rows in .json, .jsonl or .parquet; else built-in text."),
]
Samples = Annotated[
    int | None, typer.Option(help="Samples of the calibration text; else as many as the recipe has use for.")
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of a sample of the calibration text; 128 by default.")]
Seed = Annotated[
    int, typer.Option(help="For random scores, samples that are written, verification and the order of tuning.")
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Free dense tensors early: less memory.")]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="Weights stay on disk; a run that stopped goes on.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Of a .gguf file: f32, f16, bf16, q8_0, q4_0, ...; else as in the GGUF file it is made of, or f16."
    ),
]
