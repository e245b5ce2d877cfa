"""Prune the demo model, recover it by a little training, and compare all three models: `make recover-demo`."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks import common
from benchmarks.common import load_demo_model, local_tasks, split_calibration_heldout, write_results
from fxprune.checkpoint.manifest import read_manifest
from fxprune.cli.console import keep_freed, widened
from fxprune.data.built_in import offline_text
from fxprune.data.rows import Row, parse_row, read_rows
from fxprune.data.text import read_text, token_windows
from fxprune.evaluation.comparison import compare_models
from fxprune.recovery import Distillation

RESULTS = common.RESULTS / "recovery.json"
_OUTPUTS = ("folder", "out", "keep", "json_")
"""Options that name outputs and do not change the measurement."""


def training_rows(files: Iterable[Path], limit: int, seed: int) -> list[Any]:
    """Rows drawn at random, equally many from each file.

    Args:
        files: `.json` or `.jsonl` of rows, or `.txt`, each 2000 characters of which are a row.
        limit: Most rows in all.
        seed: Seed of the draw.
    """
    sources = [_rows(path) for path in files]
    share = max(1, limit // max(1, len(sources)))
    draw = random.Random(seed)
    return [row for rows in sources for row in draw.sample(rows, min(share, len(rows)))]


def calibration_windows(tokenizer: Any, rows: Iterable[Any], samples: int, tokens: int) -> torch.Tensor:
    """Token ids `(samples, tokens)`, spread evenly over the text of the rows."""
    text = "\n\n".join(_text_of(row) for row in rows)
    windows = token_windows(tokenizer, text, tokens)
    return windows[torch.linspace(0, len(windows) - 1, min(samples, len(windows))).long()]


def starts(tokenizer: Any, texts: Mapping[str, str | Path], windows: int, window: int) -> dict[str, str]:
    """Beginnings of the texts that are files, where `make bench-quality` measures."""
    files = {name: read_text(path) for name, path in texts.items() if isinstance(path, Path)}
    ids = {name: token_windows(tokenizer, text, window)[:windows].flatten() for name, text in files.items()}
    return {f"{name}, its start": tokenizer.decode(tokens) for name, tokens in ids.items()}


def without(rows: Iterable[Any], heldout: str) -> list[Any]:
    """Rows whose text does not occur in the held-out text."""
    starts = ((row, _text_of(row)[:200]) for row in rows)
    return [row for row, start in starts if not start or start not in heldout]


def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    recipe: Annotated[str, typer.Option(help="Recipe of the prune.")] = "balanced",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples of 128 tokens.")] = 352,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else the training rows.")] = None,
    slim: Annotated[Path | None, typer.Option(help="Saved slim model; else the demo model is pruned.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Rows to train on; else half the built-in text.")] = None,
    rows: Annotated[int, typer.Option(help="Most rows.")] = 300,
    text: Annotated[list[Path] | None, typer.Option(help="Text to measure on; else the other half.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 60,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window of a text.")] = 128,
    questions: Annotated[list[Path] | None, typer.Option(help="JSONL files of multiple-choice questions.")] = None,
    asked: Annotated[int, typer.Option(help="Most questions of a file.")] = 200,
    half: Annotated[Literal["first", "second"], typer.Option(help="Half of each file to ask.")] = "second",
    rank: Annotated[int, typer.Option(help="Rank of the updates.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate, after warm-up.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 4,
    whole: Annotated[bool, typer.Option(help="Include prompts in the loss.")] = True,
    distil: Annotated[float, typer.Option(help="Weight of the dense model as teacher; 0 for none.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of the teacher.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of rows, order and updates.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Measure in bfloat16: faster where the CPU has it.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep checkpoints here, and resume from them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write comparison.json, .md and .png into this folder.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Save the recovered model into this folder.")] = None,
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{RESULTS.name}.")] = False,
) -> None:
    """Prune SmolLM2-135M, recover it with LoRA, and compare."""
    settings = {name: _setting(value) for name, value in locals().items() if name not in _OUTPUTS}
    keep_freed()
    console = widened(Console())
    dense, tokenizer = load_demo_model()
    trained_on, measured_on = _texts(data, rows, seed, text)
    if slim is None:
        console.print(f"pruning {ratio:.0%} of the parameters, calibrated on {samples} x 128 tokens ...")
        source = trained_on if calibration is None else _rows(calibration)
        ids = calibration_windows(tokenizer, source, samples, 128)
        result = fxprune.prune(dense, ids, tokenizer=tokenizer, ratio=ratio, recipe=recipe, eval=False)
        pruned, plan, report = result.model, result.plan, result.report
    else:
        manifest = read_manifest(slim)
        saved_plan, saved_report = manifest.read_plan(slim), manifest.read_report(slim)
        if saved_plan is None or saved_report is None:
            raise typer.BadParameter(f"{slim} holds no plan and report of a prune")
        pruned, plan, report = fxprune.from_pretrained(slim), saved_plan, saved_report
    console.print(f"training on {len(trained_on)} rows ...")
    begin = time.perf_counter()
    recovery = fxprune.recover(
        pruned,
        trained_on,
        tokenizer,
        plan=plan,
        distil=Distillation(dense.bfloat16(), distil, temperature) if distil else None,
        folder=folder,
        rank=rank,
        learning_rate=learning_rate,
        epochs=epochs,
        batch=batch,
        response_only=not whole,
        seed=seed,
    )
    minutes = (time.perf_counter() - begin) / 60
    before, after = recovery.held_out
    console.print(
        f"{recovery.steps} steps on {recovery.data.tokens:,} tokens in {minutes:.1f} minutes; "
        f"{recovery.trained:,} parameters trained, then merged (logits moved by {recovery.merge_error:.0e})"
    )
    console.print(f"held-out loss {before:.3f} before, {after:.3f} after")
    for note in recovery.notes:
        console.print(f"note: {note}", markup=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    dense, _ = load_demo_model(dtype)
    models = {"dense": dense, "pruned": pruned.to(dtype=dtype), "recovered": recovery.model.to(dtype=dtype)}
    comparison = compare_models(
        models,
        tokenizer,
        texts={**measured_on, **starts(tokenizer, measured_on, windows, window)},
        tasks=local_tasks(questions or [], half),
        windows=windows,
        window=window,
        questions=asked,
        settings={**settings, **_outcome(report, recovery), "training_minutes": minutes, "measured_in": str(dtype)},
    )
    console.print(comparison.table(f"SmolLM2-135M-Instruct, {ratio:.0%} removed; ± one standard error"))
    if json_:
        write_results(RESULTS, comparison.to_dict())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(comparison.to_json() + "\n", encoding="utf-8")
        (out / "comparison.md").write_text(comparison.to_markdown(), encoding="utf-8")
        comparison.plot(out / "comparison.png")
    if keep is not None:
        fxprune.save_pretrained(recovery.model, keep, tokenizer, plan=plan, report=report)


def _texts(
    data: list[Path] | None, limit: int, seed: int, text: list[Path] | None
) -> tuple[list[Any], dict[str, str | Path]]:
    """Rows to train on, and texts by name to measure on, which share no text."""
    front, back = split_calibration_heldout(offline_text())
    measured: dict[str, str | Path] = {"built-in": back} if not text else named(text)
    if not data:
        return [{"text": front}], measured
    everything = "".join(value if isinstance(value, str) else read_text(value) for value in measured.values())
    return without(training_rows(data, limit, seed), everything), measured


def named(files: Sequence[Path]) -> dict[str, str | Path]:
    """Files of text by name of the folder; by folder and file if one folder has several."""
    folders = [path.parent.name for path in files]
    names = (f if folders.count(f) == 1 else f"{f}/{path.stem}" for f, path in zip(folders, files, strict=True))
    return dict(zip(names, files, strict=True))


def _rows(path: Path) -> list[Any]:
    if path.suffix != ".txt":
        return [row.fields for row in read_rows(path) if isinstance(row, Row)]
    content = read_text(path)
    return [{"text": content[start : start + 2000]} for start in range(0, len(content), 2000)]


def _text_of(row: Any) -> str:
    """Text of a row; of an instruction, without the words of the prompt template."""
    found = parse_row("row", row)
    if isinstance(found, Row) and found.kind == "instruction":
        return "\n".join(str(row[name]) for name in ("instruction", "input", "output") if row.get(name))
    text = found.text() if isinstance(found, Row) else ""
    return text if isinstance(text, str) else ""


def _setting(value: Any) -> Any:
    """Value of an option as it is recorded: of files, the names alone."""
    if isinstance(value, list):
        return [_setting(part) for part in value]
    if isinstance(value, Path):
        return f"{value.parent.name}/{value.name}" if value.stem in ("test", "valid") else value.name
    return value


def _outcome(report: fxprune.Report, recovery: fxprune.Recovery) -> dict[str, Any]:
    """Settings of the comparison that come from the prune and the recovery."""
    return {
        "achieved": report.achieved,
        "passes": [list(step) for step in report.passes],
        "verification_error": report.verification_error,
        "held_out_loss": list(recovery.held_out),
        "steps": recovery.steps,
        "trained_parameters": recovery.trained,
        "training_tokens": recovery.data.tokens,
        "counted_tokens": recovery.data.counted,
        "merge_error": recovery.merge_error,
        "notes": [*report.notes, *recovery.notes],
    }


if __name__ == "__main__":
    typer.run(main)
