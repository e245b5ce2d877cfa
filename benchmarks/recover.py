"""Prune the demo model, train it a little, and put dense, pruned and recovered side by side: `make recover-demo`."""

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
from benchmarks.demo_model import load_demo_model
from benchmarks.environment import write_results
from benchmarks.questions import local_tasks
from fxprune.checkpoint.manifest import read_manifest
from fxprune.cli.allocator import keep_freed
from fxprune.cli.console import widened
from fxprune.data.built_in import offline_text
from fxprune.data.text import (
    BadRow,
    kind_of,
    read_text,
    rows_in_file,
    split_calibration_heldout,
    text_of,
    token_windows,
)
from fxprune.evaluation.comparison import Comparison, compare_models
from fxprune.recovery import Distillation

__all__ = ["app", "calibration_windows", "named", "starts", "training_rows", "without"]

RESULTS = Path(__file__).parent / "results" / "recovery.json"
_PLACES = ("folder", "out", "keep", "json_")
"""Options that say where things are written, and nothing of what is measured."""

app = typer.Typer(add_completion=False)


def training_rows(files: Iterable[Path], limit: int, seed: int) -> list[Any]:
    """As many rows of each file, drawn at random.

    Args:
        files: `.json` or `.jsonl` of rows, or `.txt`, of which runs of 2000 characters are rows.
        limit: The most rows in all.
        seed: Of the draw.
    """
    sources = [_rows(path) for path in files]
    share = max(1, limit // max(1, len(sources)))
    draw = random.Random(seed)
    return [row for rows in sources for row in draw.sample(rows, min(share, len(rows)))]


def calibration_windows(tokenizer: Any, rows: Iterable[Any], samples: int, tokens: int) -> torch.Tensor:
    """Token ids `(samples, tokens)`, spread over the text of the rows."""
    text = "\n\n".join(_text_of(row) for row in rows)
    windows = token_windows(tokenizer, text, tokens)
    return windows[torch.linspace(0, len(windows) - 1, min(samples, len(windows))).long()]


def starts(tokenizer: Any, texts: Mapping[str, str | Path], windows: int, window: int) -> dict[str, str]:
    """The beginnings of texts, of so many tokens as are measured on, which is where `make bench-quality` measures.

    Args:
        tokenizer: Turns text into ids, and back.
        texts: By name; those that are files.
        windows: Of each.
        window: Tokens of one.
    """
    files = {name: read_text(path) for name, path in texts.items() if isinstance(path, Path)}
    ids = {name: token_windows(tokenizer, text, window, limit=windows).flatten() for name, text in files.items()}
    return {f"{name}, its start": tokenizer.decode(tokens) for name, tokens in ids.items()}


def without(rows: Iterable[Any], heldout: str) -> list[Any]:
    """The rows whose text is not part of the text that is measured on."""
    starts = ((row, _text_of(row)[:200]) for row in rows)
    return [row for row, start in starts if not start or start not in heldout]


@app.command()
def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    recipe: Annotated[str, typer.Option(help="Recipe it is pruned by, or was.")] = "balanced",
    samples: Annotated[int, typer.Option(help="Calibration samples of 128 tokens.")] = 352,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else the training rows.")] = None,
    slim: Annotated[Path | None, typer.Option(help="A slim model saved before; else it is pruned first.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Rows to train on; else half the built-in text.")] = None,
    rows: Annotated[int, typer.Option(help="The most rows.")] = 300,
    text: Annotated[list[Path] | None, typer.Option(help="Text to measure on; else the other half.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 60,
    window: Annotated[int, typer.Option(help="Tokens in a window of a text.")] = 128,
    questions: Annotated[list[Path] | None, typer.Option(help="JSONL files of multiple-choice questions.")] = None,
    asked: Annotated[int, typer.Option(help="The most questions of a file.")] = 200,
    half: Annotated[Literal["first", "second"], typer.Option(help="Half of each file that is asked.")] = "second",
    rank: Annotated[int, typer.Option(help="Of the updates.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The largest, after warm-up.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Samples of one step.")] = 4,
    whole: Annotated[bool, typer.Option(help="Prompts count in the loss as well.")] = True,
    distil: Annotated[float, typer.Option(help="Weight of the dense model as teacher; 0 for none.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the teacher.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of rows, order and updates.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Measure in bfloat16: faster where the CPU has it.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep checkpoints here, and resume from them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write comparison.json, .md and .png into this folder.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Save the recovered model into this folder.")] = None,
    json_: Annotated[bool, typer.Option("--json", help=f"Write results/{RESULTS.name} as well.")] = False,
) -> None:
    """Prune SmolLM2-135M, recover it with LoRA, and compare."""
    settings = {name: _plain(value) for name, value in locals().items() if name not in _PLACES}
    keep_freed()
    console = widened(Console())
    dense, tokenizer = load_demo_model()
    trained_on, measured_on = _texts(data, rows, seed, text)
    if slim is None:
        console.print(f"pruning {ratio:.0%} of the parameters, calibrated on {samples} x 128 tokens ...")
        source = trained_on if calibration is None else _rows(calibration)
        ids = calibration_windows(tokenizer, source, samples, 128)
        result = fxprune.prune(dense, ids, tokenizer=tokenizer, ratio=ratio, recipe=recipe)
        pruned, plan, report = result.model, result.plan, result.report
    else:
        pruned, plan, report = _read(slim)
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
    _tell(console, recovery, minutes)
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
    _write(comparison, out, json_)
    if keep is not None:
        fxprune.save_pretrained(recovery.model, keep, tokenizer, plan=plan, report=report)


def _read(folder: Path) -> tuple[Any, fxprune.Plan, fxprune.Report]:
    """A slim model that was saved, with what was removed from it and what was said of that."""
    manifest = read_manifest(folder)
    plan, report = manifest.read_plan(), manifest.read_report()
    if plan is None or report is None:
        raise typer.BadParameter(f"{folder} holds no plan and report of a prune")
    return fxprune.from_pretrained(folder), plan, report


def _texts(
    data: list[Path] | None, limit: int, seed: int, text: list[Path] | None
) -> tuple[list[Any], dict[str, str | Path]]:
    """Rows to train on and texts to measure on, which share nothing."""
    front, back = split_calibration_heldout(offline_text())
    measured: dict[str, str | Path] = {"built-in": back} if not text else named(text)
    if not data:
        return [{"text": front}], measured
    everything = "".join(value if isinstance(value, str) else read_text(value) for value in measured.values())
    return without(training_rows(data, limit, seed), everything), measured


def named(files: Sequence[Path]) -> dict[str, str | Path]:
    """Files of text by the names of their folders; with their own where one folder has several."""
    folders = [path.parent.name for path in files]
    names = (f if folders.count(f) == 1 else f"{f}/{path.stem}" for f, path in zip(folders, files, strict=True))
    return dict(zip(names, files, strict=True))


def _rows(path: Path) -> list[Any]:
    if path.suffix != ".txt":
        return [row for _, row in rows_in_file(path) if not isinstance(row, BadRow)]
    content = read_text(path)
    return [{"text": content[start : start + 2000]} for start in range(0, len(content), 2000)]


def _text_of(row: Any) -> str:
    """The text of a row, of an instruction without the words that a prompt puts around it."""
    kind, _ = kind_of(row, "auto")
    if kind != "instruction":
        return text_of(row, kind) if kind else ""
    return "\n".join(str(row[name]) for name in ("instruction", "input", "output") if row.get(name))


def _plain(value: Any) -> Any:
    """An option as it is written down: of files the names alone."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return f"{value.parent.name}/{value.name}" if value.stem in ("test", "valid") else value.name
    return value


def _outcome(report: fxprune.Report, recovery: fxprune.Recovery) -> dict[str, Any]:
    """What beside the columns belongs in the report."""
    return {
        "achieved": report.achieved,
        "passes": [list(ran) for ran in report.passes],
        "verification_error": report.verification_error,
        "held_out_loss": list(recovery.held_out),
        "steps": recovery.steps,
        "trained_parameters": recovery.trained,
        "training_tokens": recovery.data.tokens,
        "counted_tokens": recovery.data.counted,
        "merge_error": recovery.merge_error,
        "notes": [*report.notes, *recovery.notes],
    }


def _tell(console: Console, recovery: fxprune.Recovery, minutes: float) -> None:
    before, after = recovery.held_out
    console.print(
        f"{recovery.steps} steps on {recovery.data.tokens:,} tokens in {minutes:.1f} minutes; "
        f"{recovery.trained:,} parameters trained, then merged (logits moved by {recovery.merge_error:.0e})"
    )
    console.print(f"held-out loss {before:.3f} before, {after:.3f} after")
    for note in recovery.notes:
        console.print(f"note: {note}", markup=False)


def _write(comparison: Comparison, out: Path | None, json_: bool) -> None:
    if json_:
        write_results(RESULTS, comparison.to_dict())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(comparison.to_json() + "\n", encoding="utf-8")
        (out / "comparison.md").write_text(comparison.to_markdown(), encoding="utf-8")
        comparison.plot(out / "comparison.png")


if __name__ == "__main__":
    app()
