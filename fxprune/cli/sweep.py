"""The command that prunes a model by several recipes and ratios, and compares the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.config import parse_number
from fxprune.cli.console import MeasuringCommand, app, console, keep_freed, print_json, print_lines, progress
from fxprune.cli.models import check_model, load
from fxprune.cli.preparation import CalibrationText, prepare
from fxprune.errors import ArgumentError
from fxprune.recipes.options import Options

_RATIO = "Fractions of the parameters to remove."
_KEEP = "Models to keep: all, those that nothing else beats, or none."
_AT_MOST = "Recommend the smallest model whose perplexity is at most this many times that of MODEL: 1.3x."


@app.command(cls=MeasuringCommand)
@flags.library_options(Options)
def sweep(
    model: flags.Folder,
    out: Annotated[Path, typer.Option(callback=flags.expanded, help="Folder for the table, the picture and models.")],
    ratio: Annotated[str, flags.what_goes(metavar="N,...", help=_RATIO)] = "0.1,0.2,0.35",
    recipe: Annotated[str, flags.what_goes(metavar="NAME,...", help="Recipes, by name or as files.")] = "fast,balanced",
    keep: Annotated[Literal["all", "best", "none"], typer.Option(help=_KEEP)] = "best",
    bench: Annotated[bool, typer.Option("--bench", help="Measure the time of a generated token as well.")] = False,
    at_most: Annotated[str | None, typer.Option(help=_AT_MOST)] = None,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    tokens: flags.Tokens = None,
    gguf_file: flags.Gguf = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    force: flags.Force = False,
    quiet: flags.QuietButResult = False,
    verbose: flags.Verbose = False,
    as_json: flags.Json = False,
    **options: Any,
) -> None:
    """Prune MODEL by several recipes and ratios, and compare size and quality; resumes an interrupted sweep."""
    from fxprune.sweep.run import check_sweep

    most = None if at_most is None else parse_number(at_most.removesuffix("x"))
    if isinstance(most, str) or not (most is None or most > 0):
        raise ArgumentError(f"{at_most!r} is not a multiple", where="--at-most", remedy="Give a number, as in 1.3x")
    ratios = [parse_number(part.strip()) for part in ratio.split(",")]
    recipes = [part.strip() for part in recipe.split(",")]
    asked = check_sweep(ratios, recipes, keep, options)
    text = CalibrationText(calibration, samples, tokens)
    check_model(model, gguf_file, with_weights=True)
    text.check()
    if calibration is not None:
        options = {"eval_text": calibration, **options}
    every = ({**options, **own} for own in asked.values())
    prepared = [prepare(model, gguf_file, text, each, needs_tokenizer=True, dry_run=False) for each in every]
    given = [one.samples for one in prepared if one.samples is not None]
    keep_freed()
    found = fxprune.sweep(
        load(model, gguf_file, dtype=dtype, device=device),
        max(given, key=lambda samples: len(samples["input_ids"]), default=None),
        out=out,
        ratio=ratios,  # type: ignore[arg-type]
        recipe=recipes,
        keep=keep,
        bench=bench,
        force=force,
        tokenizer=prepared[0].tokenizer,
        track=progress,
        **options,
    )
    best = None if most is None else found.recommend(most)
    if as_json:
        print_json({**found.to_dict(), "recommended": None if best is None else best.name})
        return
    console.print(found.table())
    print_lines(f"measured on {text}" for text in dict.fromkeys(row.measured_on for row in found.rows))
    if most is not None:
        none = "none of them; smaller ratios or the recipe `best` may be"
        print_lines([f"perplexity at most {most:g} x: {none if best is None else best.name}"])
