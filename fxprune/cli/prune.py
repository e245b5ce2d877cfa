"""The command that prunes a model and writes the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

import fxprune
from fxprune.cli import console, output
from fxprune.cli import options as flags
from fxprune.cli.config import format_run, is_file
from fxprune.cli.console import ONE_OF_TWO, option_name, run_progress, working
from fxprune.cli.models import check_model, hide_bars, is_gguf, load, locate_model, model_class
from fxprune.cli.preparation import CalibrationText, Prepared, prepare
from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import has_vocab
from fxprune.recipes.options import Options


@console.app.command(cls=console.Command)
@flags.library_options(Options)
def prune(
    call: typer.Context,
    model: flags.Folder,
    out: flags.Out = None,
    config: flags.Config = None,
    dry_run: flags.DryRun = False,
    group_ratio: flags.GroupRatio = None,
    taylor: flags.Taylor = None,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    tokens: flags.Tokens = None,
    low_memory: flags.LowMemory = False,
    gguf_file: flags.Gguf = None,
    quantization: flags.Quantization = None,
    push_to_hub: flags.PushToHub = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    force: flags.Force = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
    as_json: flags.Json = False,
    **options: Any,
) -> None:
    """Prune MODEL and write a checkpoint, its plan, report and run.yaml to OUT; or one file, and these beside it."""
    from fxprune.offload.prefetch import as_device

    _check_options(call, out, dry_run=dry_run, low_memory=low_memory)
    _replace_deprecated(options, taylor, group_ratio)
    to_gguf = out is not None and out.suffix == ".gguf"
    if to_gguf:
        quantization = _quantization(options.get("target"), quantization)
    check_model(model, gguf_file, with_weights=not dry_run, any_class=True)
    text = CalibrationText(calibration, samples, tokens, None if gguf_file is not None else model_class(model))
    output.check_quantization(quantization, out)
    if to_gguf:  # one epsilon for all norms, and rows of whole blocks
        from fxprune.export.gguf.quantization import row_multiple

        multiple = row_multiple(output.gguf_options(model, None, quantization)["quantization"])
        options = {"norm": "sliced", "round_to": {"mlp": multiple}, **options}
    if push_to_hub is not None:
        output.check_push(push_to_hub, out)
    if out is not None:
        force = output.check_output(out, model, force=force)
    text.check()
    as_device(device)
    if low_memory:
        check_model(model, gguf_file)  # of other classes the weights are in memory
    if calibration is not None and not text.needs_processor:
        options = {"eval_text": calibration, **options}
    effective = {"memory": "low", **options} if low_memory else options
    needs_tokenizer = (to_gguf and not is_gguf(model)) or has_vocab(options)
    needs = {"needs_tokenizer": needs_tokenizer, "needs_model": low_memory or to_gguf}
    prepared = prepare(model, gguf_file, text, effective, dry_run=dry_run, **needs)
    if dry_run:
        from fxprune.cli.dry_run import estimate, print_estimate

        found = estimate(model, gguf_file, text, effective, prepared, dtype=dtype, low_memory=low_memory)
        print_estimate(found, as_json=as_json)
        return
    assert out is not None
    run = format_run(call)
    if low_memory:
        source = locate_model(model) if gguf_file is None else Path(model).expanduser() / gguf_file
        hide_bars()
        with run_progress("pruning from disk") as shown:
            options |= {"tokenizer": prepared.tokenizer, "force": force, "device": device, **shown}
            options["also"] = lambda _, folder: output.write_run(run, folder / "run.yaml")
            result, loading = fxprune.prune_checkpoint(source, out, prepared.samples, **options), output.OURS
    else:
        console.keep_freed()
        dense = load(model, gguf_file, dtype=dtype, device=device)
        export = output.gguf_options(model, prepared.tokenizer, quantization) if to_gguf else {}
        result = _prune_in_memory(dense, prepared, export, options)
        words = prepared.processor or prepared.tokenizer
        with working(f"writing {out}"):
            loading = output.write_result(result, out, words, export, run=run, force=force)
    output.print_result(result, out, loading, as_json=as_json)
    if push_to_hub is not None:
        output.push(out, push_to_hub)


def _prune_in_memory(dense: Any, prepared: Prepared, export: dict[str, Any], options: dict[str, Any]) -> fxprune.Result:
    """Prune a model in memory, if a GGUF file to be written with options ``export`` can hold it; compare the two."""
    from fxprune.evaluation.agreement import agreement

    if export:
        from fxprune.export.gguf.write import check_gguf

        with working("checking that a GGUF file can hold the model"):
            check_gguf(dense, **{name: value for name, value in export.items() if name != "quantization"})
    with run_progress("pruning") as shown:
        result = fxprune.prune(dense, prepared.samples, tokenizer=prepared.tokenizer, **shown, **options)
    if not prepared.held_out or result.model is None or result.report.quality is not None or options.get("inplace"):
        return result
    with working("comparing dense and slim"):
        rows = tuple(agreement(dense, result.model, prepared.held_out).rows())
    return replace(result, report=replace(result.report, measured=rows, unmeasured=""))


def _quantization(target: str | None, given: str | None) -> str | None:
    """The type of a GGUF file: the one given, or that of a target in bytes."""
    from fxprune.removal.target import parse_target

    budget = "" if target is None else parse_target(target).budget
    counted = budget.removeprefix("bytes@") if budget.startswith("bytes@") else None
    if given is not None and counted is not None and given.lower() != counted:
        what = f"{given} beside --target {target}: the file has another type than the target"
        raise ArgumentError(what, where="--quantization", remedy="Leave it out")
    return given or counted


def _check_options(context: typer.Context, out: Path | None, *, dry_run: bool, low_memory: bool) -> None:
    """Refuse a missing output, a file where only a folder can be written, and options that exclude each other."""
    if out is None and not dry_run:
        raise ArgumentError("no output is given", where="--out", remedy="Give --out, or --dry-run to look")
    if low_memory and out is not None and is_file(out):
        remedy = "Prune to a folder, and make the file of it with `fxprune export`"
        raise ArgumentError(f"it writes a folder, and {out} is a file", where="--low-memory", remedy=remedy)
    for one, other, why in (
        ("ratio", "group_ratio", "both name the fraction to remove"),
        ("select", "group_ratio", "both choose the selection"),
        ("low_memory", "inplace", "weights on disk are not changed in place"),
        ("low_memory", "dtype", "weights on disk are used in the dtype of their files"),
    ):
        if console.is_given(context, one) and console.is_given(context, other):
            what = f"cannot be given with {option_name(other)}: {why}"
            raise ArgumentError(what, where=option_name(one), remedy=ONE_OF_TWO)


def _replace_deprecated(options: dict[str, Any], taylor: str | None, group_ratio: float | None) -> None:
    """Replace deprecated options by spellings of passes, with a warning for each."""
    for old, value, stage, choice in (
        ("--taylor", taylor, "importance", f"taylor{{order={taylor}}}"),
        ("--group-ratio", group_ratio, "select", f"select-by-group-ratio{{group_ratio={group_ratio}}}"),
    ):
        if value is None:
            continue
        if stage == "importance" and options.get(stage, "taylor") not in ("taylor", choice):
            remedy = f"Leave --taylor out: write --importance '{choice}'"
            raise ArgumentError("cannot be given with another --importance", where=old, remedy=remedy)
        options[stage] = choice
        console.notes.print(f"warning: {old} is deprecated: write --{stage} '{choice}'")
