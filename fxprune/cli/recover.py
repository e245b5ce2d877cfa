"""The command that trains a saved model a little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.allocator import keep_freed
from fxprune.cli.console import Dtype, Force, Quiet, app, clear_errors, console, progress, set_output
from fxprune.cli.load import load_either
from fxprune.cli.place import at_home, check_output, is_file
from fxprune.cli.several import checked
from fxprune.data.text import SUFFIXES
from fxprune.errors import ArgumentError

__all__ = ["recover"]

TrainingDevice = Annotated[
    str | None, typer.Option(help="Where to train: cpu, cuda or mps; the accelerators that there are by default.")
]


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a slim or a dense model, or id on a hub.")],
    data: Annotated[
        str, typer.Option(help="Rows to train on: a .json, .jsonl, .txt or .parquet file, or the id of a hub data set.")
    ],
    out: Annotated[Path, typer.Option(callback=at_home, help="Folder to write to.")],
    distil: Annotated[str | None, typer.Option(help="Dense model as teacher.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; a run that stopped goes on from the last one there.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; 2 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The largest, after warm-up; 1e-4 by default.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the low-rank updates; 8 by default.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Updates are scaled by alpha / rank; 16 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step; 64 by default.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Of these in memory at once; 4 by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest sample; 256 by default.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Fraction of the samples to judge by, or their number; 0.04 by default.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, float32, or auto by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split, the order and the updates.")] = None,
    dtype: Dtype = None,
    device: TrainingDevice = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train MODEL a little, by LoRA on what was pruned, and write it to OUT as it came, with its plan and report."""
    given: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "rank": rank,
        "alpha": alpha,
        "batch": batch,
    }
    given |= {"micro_batch": micro_batch, "max_tokens": max_tokens, "held_out": held_out}
    given |= {"precision": precision, "seed": seed}
    with clear_errors():
        set_output(quiet=quiet)
        checked([model, *([distil] if distil else [])], dtype, device)
        _check_training_device(device)
        if is_file(out):
            raise ArgumentError(
                f"out is {out}, a file", where="out", remedy="Name a folder; `fxprune export` writes files"
            )
        check_output(out, model, force=force)
        from fxprune.data.text import rows_in_file
        from fxprune.recovery.settings import settings_from

        settings = settings_from(None, {name: value for name, value in given.items() if value is not None})
        rows = Path(data) if Path(data).exists() or Path(data).suffix in SUFFIXES else data
        if isinstance(rows, Path):
            rows_in_file(rows)  # a file that cannot be read is told before the model is read
        loading = {"dtype": dtype, "device": device}
        _run(model, rows, out, {"distil": distil, "folder": folder, "settings": settings}, loading, force=force)


def _check_training_device(device: str | None) -> None:
    """Refuse one device of several: training takes all that the process sees.

    Raises:
        ArgumentError: it is one of several.
    """
    kind, _, number = (device or "").partition(":")
    if number:
        raise ArgumentError(
            f"device is {device}, and training takes every {kind} device that it sees",
            where="device",
            remedy=f"Give --device {kind}, and let the process see one alone, as CUDA_VISIBLE_DEVICES={number} does",
        )


def _run(
    model: str, data: str | Path, out: Path, options: dict[str, Any], loading: dict[str, Any], *, force: bool
) -> None:
    """Load, train and write.

    Args:
        model: what the user named.
        data: what to train on.
        out: where to.
        options: of :func:`fxprune.recover`; a teacher by what the user named.
        loading: dtype and device, of the model and of its teacher.
        force: whether ``out`` may hold something else.
    """
    import fxprune
    from fxprune.checkpoint.manifest import MANIFEST, read_manifest
    from fxprune.offload.ranks import is_first

    keep_freed()
    loaded, tokenizer = load_either(model, None, with_tokenizer=True, **loading)
    plan: Any = None
    report: Any = None
    if (Path(model) / MANIFEST).is_file():
        manifest = read_manifest(Path(model))
        plan, report = manifest.read_plan(), manifest.read_report()
        loaded.config._name_or_path = manifest.source["name"]  # of the dense model
    if options["distil"] is not None:
        options["distil"] = load_either(options["distil"], None, with_tokenizer=False, **loading)[0]
    arguments = {"use_cpu": True} if loading["device"] == "cpu" else None
    recovery = fxprune.recover(
        loaded, data, tokenizer, plan=plan, inplace=True, arguments=arguments, track=progress, **options
    )

    def also(folder: Path) -> None:
        for name, facts in {"plan": plan, "report": report, "recovery": recovery}.items():
            if facts is not None:
                (folder / f"{name}.json").write_text(facts.to_json(), encoding="utf-8")

    fxprune.save_pretrained(recovery.model, out, tokenizer, plan=plan, report=report, force=force, also=also)
    if not is_first():
        return
    before, after = recovery.held_out
    lines = [f"note: {note}" for note in recovery.notes]
    lines.append(
        f"{recovery.steps:,} steps on {recovery.data.train:,} samples, {recovery.trained:,} parameters trained"
    )
    lines.append(f"held-out loss {before:.3f} before, {after:.3f} after; model written to {out}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
