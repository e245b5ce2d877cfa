"""The command that applies the plan of an earlier prune."""

from __future__ import annotations

from typing import Any

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.console import Command, app, run_progress
from fxprune.cli.models import check_model, is_gguf, load, load_words
from fxprune.cli.output import check_output, check_quantization, gguf_options, print_result, write_result
from fxprune.cli.plan import Source, read_plan
from fxprune.cli.preparation import CalibrationText
from fxprune.errors import ArgumentError
from fxprune.recipes.options import ApplyOptions


@app.command(cls=Command)
@flags.library_options(ApplyOptions)
def apply(
    model: flags.Folder,
    plan: Source,
    out: flags.Out = None,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    tokens: flags.Tokens = None,
    gguf_file: flags.Gguf = None,
    quantization: flags.Quantization = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    force: flags.Force = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
    as_json: flags.Json = False,
    **options: Any,
) -> None:
    """Apply PLAN, made for MODEL or for a model of its shape; writes the same files as `prune`."""
    from fxprune.offload.prefetch import as_device

    if out is None:
        raise ArgumentError("no output is given", where="--out", remedy="Give --out")
    text = CalibrationText(calibration, samples, tokens)
    text.check()
    check_model(model, gguf_file, with_weights=True)
    check_quantization(quantization, out)
    force = check_output(out, model, force=force)
    as_device(device)
    to_gguf = out.suffix == ".gguf"
    if to_gguf:
        options.setdefault("norm", "sliced")  # a GGUF file has one epsilon for all norms
    fxprune.prune_pipeline((), **options)  # refuses wrong options before any work
    removal = read_plan(plan).plan
    needs_data = any(options.get(name, "none") != "none" for name in ("compensate", "tune"))
    needed = needs_data or calibration is not None or (to_gguf and not is_gguf(model)) or bool(removal.vocabulary)
    tokenizer = load_words(model, gguf_file, needed=needed)
    data = text.read(tokenizer)
    dense = load(model, gguf_file, dtype=dtype, device=device)
    with run_progress("pruning") as shown:
        result = fxprune.apply(dense, removal, data, tokenizer=tokenizer, **shown, **options)
    export = gguf_options(model, tokenizer, quantization) if to_gguf else {}
    loading = write_result(result, out, tokenizer, export, run=None, force=force)
    print_result(result, out, loading, as_json=as_json)
