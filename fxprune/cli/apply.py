"""The command that removes from a model what an earlier prune decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.checks import check_dtype_and_device, check_pass, check_printing, check_quantization, check_word
from fxprune.cli.console import (
    Device,
    Dtype,
    Folder,
    Force,
    Gguf,
    Json,
    Quiet,
    Verbose,
    app,
    clear_errors,
    progress,
    set_output,
    working,
)
from fxprune.cli.load import is_gguf, load_either
from fxprune.cli.naming import check_model
from fxprune.cli.numbers import check_samples
from fxprune.cli.place import check_output, is_file
from fxprune.cli.plan import Source, read_plan
from fxprune.cli.preparation import samples_of
from fxprune.cli.prune import tell, write, write_file
from fxprune.data.text import calibration_text
from fxprune.errors import ArgumentError

__all__ = ["apply"]


@app.command()
def apply(
    model: Folder,
    plan: Source,
    out: flags.Out = None,
    compensate: flags.Compensate = None,
    tune: flags.Tune = None,
    norm: flags.Norm = None,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    tokens: flags.Tokens = None,
    in_place: flags.InPlace = False,
    gguf_file: Gguf = None,
    quantization: flags.Quantization = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Remove from MODEL what PLAN says, made for it or for a sibling of its shape; write what `prune` writes."""
    values = dict(locals())
    with clear_errors():
        set_output(quiet=quiet, verbose=verbose, as_json=as_json)
        _check(values)
        _run(values, read_plan(plan).plan)


def _check(values: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
        FxpruneError: says which option, what is wrong with it, and what would do.
    """
    if values["out"] is None:
        raise ArgumentError("there is no place to write to", where="out", remedy="Give --out")
    check_printing(quiet=values["quiet"], verbose=values["verbose"])
    check_samples(values)
    check_word("norm", values["norm"])
    check_dtype_and_device(values["dtype"], values["device"])
    for stage in ("compensate", "tune"):
        check_pass(stage, values[stage], optional=True)
    check_model(values["model"], values["gguf_file"], with_weights=True)
    check_quantization(values["quantization"], values["out"])
    check_output(values["out"], values["model"], force=values["force"])
    if values["calibration"] is not None:
        calibration_text(values["calibration"])


def _run(values: Mapping[str, Any], plan: fxprune.Plan) -> None:
    """Load, apply and write.

    Args:
        values: of the options of the command.
        plan: what goes.
    """
    model, out, gguf_file = values["model"], values["out"], values["gguf_file"]
    to_gguf = out.suffix == ".gguf"
    needed = any(values[name] for name in ("compensate", "tune", "calibration")) or (to_gguf and not is_gguf(model))
    loading = {"dtype": values["dtype"], "device": values["device"]}
    dense, tokenizer = load_either(model, gguf_file, with_tokenizer=needed, **loading)
    with working("pruning"):
        result = fxprune.apply(
            dense,
            plan,
            samples_of(values, tokenizer, values["samples"]),
            compensate=values["compensate"],
            tune=values["tune"],
            norm=values["norm"] or ("sliced" if to_gguf else None),  # it has one epsilon for all norms
            tokenizer=tokenizer,
            inplace=values["in_place"],
            track=progress,
        )
    made = write_file if is_file(out) else write
    how = {"like": model, "quantization": values["quantization"], "force": values["force"]}
    tell(result, out, made(result, tokenizer, out, **how), as_json=values["as_json"])
