"""The command that prunes a model, and writes what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.allocator import keep_freed
from fxprune.cli.checks import check_prune
from fxprune.cli.config import run_file, spelled_run
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
    console,
    print_json,
    progress,
    set_output,
    working,
)
from fxprune.cli.dry_run import tell_expected
from fxprune.cli.export import gguf_options, runs
from fxprune.cli.load import load_model, source_of
from fxprune.cli.place import is_file
from fxprune.cli.preparation import prepare
from fxprune.errors import FxpruneError

__all__ = ["prune", "prune_options", "tell", "write", "write_file"]

_OURS = "fxprune.from_pretrained loads it, and transformers with trust_remote_code=True"

_SAME = (
    *("recipe", "ratio", "group_ratio", "importance", "taylor", "reduction", "ranking"),
    *("protect", "uniform", "compensate", "tune", "seed"),
)
"""Options that are arguments of the same name."""


@app.command()
def prune(
    model: Folder,
    out: flags.Out = None,
    config: flags.Config = None,
    dry_run: flags.DryRun = False,
    recipe: flags.Recipe = None,
    ratio: flags.Ratio = None,
    group_ratio: flags.GroupRatio = None,
    kinds: flags.Kinds = None,
    importance: flags.Importance = None,
    taylor: flags.Taylor = None,
    reduction: flags.Reduction = None,
    ranking: flags.Ranking = None,
    protect: flags.Protect = None,
    round_to: flags.RoundTo = None,
    uniform: flags.Uniform = False,
    norm: flags.Norm = None,
    compensate: flags.Compensate = None,
    tune: flags.Tune = None,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    tokens: flags.Tokens = None,
    seed: flags.Seed = 0,
    in_place: flags.InPlace = False,
    low_memory: flags.LowMemory = False,
    gguf_file: Gguf = None,
    quantization: flags.Quantization = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL and write a checkpoint, its plan, report and run.yaml to OUT; or one file, and these beside it."""
    values = dict(locals())
    with clear_errors():
        set_output(quiet=quiet, verbose=verbose, as_json=as_json)
        check_prune(values)
        if dry_run:
            tell_expected(values, prune_options(values))
        else:
            _run(values, prune_options(values))


def prune_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`fxprune.prune` that the options of the command stand for."""
    to_gguf = values["out"] is not None and values["out"].suffix == ".gguf"
    options = {name: values[name] for name in _SAME}
    options["kinds"] = _names(values["kinds"])
    options["round_to"] = _multiple(values["round_to"], to_gguf=to_gguf)
    options["norm"] = values["norm"] or ("sliced" if to_gguf else None)  # it has one epsilon for all norms
    options["inplace"] = values["in_place"]
    return options


def _run(values: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Load, prune and write.

    Args:
        values: of the options of the command.
        options: of a prune.
    """
    model, out, gguf_file = values["model"], values["out"], values["gguf_file"]
    with working("starting"):
        prepared = prepare(values, options)
    tokenizer, data = prepared.tokenizer, prepared.samples
    run = spelled_run(values)
    force = values["force"] or run_file(out, is_file=is_file(out)).is_file()
    if values["low_memory"]:
        options = {name: value for name, value in options.items() if name != "tune" or value is not None}
        source = source_of(model, gguf_file)
        written: dict[str, Any] = {"force": force, "also": partial(_fill, run=run), "device": values["device"]}
        result = fxprune.prune_checkpoint(source, out, data, tokenizer=tokenizer, track=progress, **written, **options)
        loading = _OURS
    else:
        keep_freed()
        dense = load_model(model, gguf_file, dtype=values["dtype"], device=values["device"])
        if out.suffix == ".gguf":
            _check_gguf(dense, gguf_options(model, tokenizer, values["quantization"]))
        with working("pruning"):
            result = fxprune.prune(dense, data, tokenizer=tokenizer, track=progress, **options)
        made = write_file if is_file(out) else write
        with working(f"writing {out}"):
            loading = made(
                result, tokenizer, out, like=model, quantization=values["quantization"], run=run, force=force
            )
    tell(result, out, loading, as_json=values["as_json"])


def _check_gguf(dense: Any, options: dict[str, Any]) -> None:
    """Refuse a model that no GGUF file can say before it is pruned for one."""
    from fxprune.export.gguf.write import check_gguf

    with working("looking how a GGUF file says the model"):
        check_gguf(dense, **{name: value for name, value in options.items() if name != "quantization"})


def _names(kinds: str | None) -> list[str] | None:
    return None if kinds is None else [kind.strip() for kind in kinds.split(",")]


def write(
    result: fxprune.Result, tokenizer: Any, out: Path, *, run: str | None = None, force: bool = False, **_: Any
) -> str:
    """Write all there is to ``out``; returns how to load it.

    Args:
        result: of a prune.
        tokenizer: of the model.
        out: a folder; what is written takes its place in one step.
        run: what :func:`fxprune.cli.config.spelled_run` made of the arguments.
        force: whether it may hold something else.
    """
    from fxprune.checkpoint.write import write_folder
    from fxprune.offload.ranks import first_alone

    if result.model is None:

        def fill(folder: Path) -> None:
            result.export(folder / "model.pt2")
            _fill(result, folder, run=run)

        first_alone(lambda: write_folder(out, fill, force=force), FxpruneError)
        return "there is no slim model of this class, torch.export.load runs model.pt2"
    structure = result.save_pretrained(out, tokenizer, force=force, also=partial(_fill, result, run=run))
    return "any transformers loads it" if structure.is_stock else _OURS


def write_file(
    result: fxprune.Result,
    tokenizer: Any,
    out: Path,
    *,
    like: str,
    quantization: str | None,
    run: str | None = None,
    **_: Any,
) -> str:
    """Write one file, with plan and report beside it; returns what runs it."""
    from fxprune.export.files import replacing
    from fxprune.offload.ranks import first_alone

    options = gguf_options(like, tokenizer, quantization) if out.suffix == ".gguf" else {"quantization": quantization}

    def write() -> None:
        with replacing(out) as path:
            result.export(path, **options)
            _write_facts(result, path.with_suffix(".plan.json"), path.with_suffix(".report.json"))
            result.write_report(path.with_suffix(".report.html"))
            _write_run(run, run_file(path, is_file=True))

    first_alone(write, FxpruneError)
    return runs(out)


def _fill(result: fxprune.Result, folder: Path, *, run: str | None) -> None:
    """Write what is known of a prune into its folder; the page is in that of a model already."""
    _write_facts(result, folder / "plan.json", folder / "report.json")
    if result.model is None:
        result.write_report(folder / "report.html")
    _write_run(run, run_file(folder, is_file=False))


def _write_facts(result: fxprune.Result, plan: Path, report: Path) -> None:
    plan.write_text(result.plan.to_json(), encoding="utf-8")
    report.write_text(result.report.to_json(), encoding="utf-8")


def _write_run(run: str | None, file: Path) -> None:
    if run is not None:
        file.write_text(run, encoding="utf-8")


def _multiple(round_to: str | None, *, to_gguf: bool) -> Any:
    """Return what widths are multiples of; those of MLPs fill the blocks of quantised types."""
    if round_to is None:
        return {"mlp": 32} if to_gguf else 1
    return int(round_to) if round_to.isdecimal() else round_to


def tell(result: fxprune.Result, out: Path, loading: str, *, as_json: bool = False) -> None:
    """Print the numbers, the widths that changed, and what the user should know, such as how to load the model."""
    from fxprune.offload.ranks import is_first

    if not is_first():
        return
    report = result.report
    if as_json:
        print_json({"out": str(out), "loading": loading, **report.to_dict()})
        return
    console.print(report.table())
    shrunk = Counter((name.rpartition("/")[2], *width) for name, width in report.widths.items())
    lines = [f"{what}: {before:,} to {after:,} units in {n:,} group(s)" for (what, before, after), n in shrunk.items()]
    lines += [f"layer removed: {block}" for block in report.removed_blocks]
    lines += [f"note: {note}" for note in (*report.model_reasons, *report.notes)]
    if report.verification_error is not None:
        lines.append(f"verified: masked and slim outputs differ by {report.verification_error:.1e} at most")
    lines.append(f"{report.achieved:.2%} of the parameters removed; model, plan and report written to {out}: {loading}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
