"""The command that trains a saved model briefly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.config import is_file
from fxprune.cli.console import Command, app, keep_freed, print_lines, progress
from fxprune.cli.models import check_models, load_pair
from fxprune.cli.output import check_output
from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import MANIFEST
from fxprune.recovery.settings import RecoverySettings

_DATA = "Rows to train on: a .json, .jsonl, .txt or .parquet file; or a data set: wikitext2, c4, OWNER/NAME."
_FOLDER = "Folder for checkpoints; an interrupted run resumes from the last one."
_DEVICE = "Device to train on: cpu, cuda or mps (default: all accelerators)."
_SHARDED = "Under torchrun: shard the weights of model and teacher over processes."


@app.command(cls=Command)
@flags.library_options(RecoverySettings)
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a slim or a dense model, or hub id.")],
    data: Annotated[str, typer.Option(help=_DATA)],
    out: Annotated[Path, typer.Option(callback=flags.expanded, help="Folder to write to.")],
    distil: Annotated[str | None, typer.Option(help="Dense model as teacher.")] = None,
    folder: Annotated[Path | None, typer.Option(help=_FOLDER)] = None,
    dtype: flags.Dtype = None,
    device: Annotated[str | None, typer.Option(help=_DEVICE)] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help=_SHARDED)] = False,
    force: flags.Force = False,
    quiet: flags.Quiet = False,
    **options: Any,
) -> None:
    """Train MODEL briefly, by LoRA on its pruned layers, and write it to OUT with its plan and report."""
    from fxprune.checkpoint.manifest import read_manifest
    from fxprune.data.named import ROW_SUFFIXES
    from fxprune.data.rows import read_rows
    from fxprune.offload.ranks import world_size
    from fxprune.recovery import Distillation
    from fxprune.recovery.run import report_after_training

    check_models([model, *([distil] if distil else [])])
    kind, _, number = (device or "").partition(":")
    if number:
        what = f"training takes every {kind} device that it sees, and {device} is one of them"
        remedy = f"Give --device {kind} with CUDA_VISIBLE_DEVICES={number} in the environment"
        raise ArgumentError(what, where="--device", remedy=remedy)
    if is_file(out):
        raise ArgumentError(f"{out} is a file", where="--out", remedy="Name a folder; `fxprune export` writes files")
    force = check_output(out, model, force=force)
    if folder is None and world_size() > 1:
        remedy = "Give --folder, one that all of them can write to"
        raise ArgumentError("several processes need one folder", where="--folder", remedy=remedy)
    settings = RecoverySettings(**options)
    rows = Path(data) if Path(data).exists() or Path(data).suffix in ROW_SUFFIXES else data
    if isinstance(rows, Path):
        read_rows(rows)  # refuses a file that cannot be read before the model is loaded
    keep_freed()
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "sharded": sharded}
    loaded, tokenizer = load_pair(model, **loading)
    plan = report = None  # of a slim model, if it was saved with them; without figures that training changes
    if (Path(model) / MANIFEST).is_file():
        manifest = read_manifest(Path(model))
        plan, report = manifest.read_plan(Path(model)), manifest.read_report(Path(model))
        loaded.config._name_or_path = manifest.source["name"]  # that of the dense model
        report = None if report is None else report_after_training(report)
    more: dict[str, Any] = {"plan": plan, "folder": folder, "settings": settings, "inplace": True, "track": progress}
    if distil is not None:
        dense, words = load_pair(distil, needed=False, **loading)
        more["distil"] = Distillation(dense, tokenizer=words)
    if device == "cpu":
        more["arguments"] = {"use_cpu": True}
    recovery = fxprune.recover(loaded, rows, tokenizer, **more)

    def write_recovery(work: Path) -> None:
        (work / "recovery.json").write_text(recovery.to_json(), encoding="utf-8")

    fxprune.save_pretrained(recovery.model, out, tokenizer, plan=plan, report=report, force=force, also=write_recovery)
    before, after = recovery.held_out
    print_lines(f"note: {note}" for note in recovery.notes)
    size = f"{recovery.data.train:,} samples, {recovery.trained:,} parameters trained"
    print_lines([f"{recovery.steps:,} steps on {size}"])
    print_lines([f"held-out loss {before:.3f} before, {after:.3f} after; model written to {out}"])
