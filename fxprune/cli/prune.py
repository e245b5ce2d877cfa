"""The command that prunes a model, and writes what came of it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli.console import Folder, Gguf, app, clear_errors, console, progress
from fxprune.cli.export import Quantization, gguf_options, runs
from fxprune.cli.load import is_gguf, load, load_tokenizer
from fxprune.errors import FxpruneError

__all__ = ["prune"]

_OURS = "fxprune.from_pretrained loads it, and transformers with trust_remote_code=True"


@app.command()
def prune(
    model: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write to, or a file: .gguf, .pt2 or .onnx.")],
    recipe: Annotated[
        str | None, typer.Option(help="balanced, fast, best, llm-pruner or a .txt file; see `fxprune recipes`.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the parameters to remove; 0.2 by default.")] = None,
    group_ratio: Annotated[float | None, typer.Option(help="Fraction of each group's units, instead.")] = None,
    kinds: Annotated[str | None, typer.Option(help="Comma-separated kinds, as in 'mlp,head'.")] = None,
    importance: Annotated[
        str | None, typer.Option(help="taylor, l1, l2, random or another pass, as in 'taylor{order=second}'.")
    ] = None,
    taylor: Annotated[str | None, typer.Option(help="Order of taylor: vector, first, second or mix.")] = None,
    reduction: Annotated[str | None, typer.Option(help="sum, prod, max, mean, first or last.")] = None,
    ranking: Annotated[str | None, typer.Option(help="local (in each group) or global.")] = None,
    protect: Annotated[tuple[int, int] | None, typer.Option(help="Layers kept whole in front and at the end.")] = None,
    round_to: Annotated[
        str | None,
        typer.Option(help="Widths stay multiples of this, or auto; MLPs of 32 by default in a .gguf file, else 1."),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Equal layers, for a stock checkpoint.")] = False,
    norm: Annotated[
        str | None,
        typer.Option(help="Norms over units that go: masked, as with these zeroed, or sliced; a .gguf file: sliced."),
    ] = None,
    compensate: Annotated[str | None, typer.Option(help="least-squares: refit what stays; none: do not.")] = None,
    tune: Annotated[str | None, typer.Option(help="tune, as in 'tune{epochs=2}', or none.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on: .txt, or .jsonl with 'text'; else built-in text.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration samples; else as many as the recipe has use for.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 128,
    seed: Annotated[int, typer.Option(help="For random importance and verification.")] = 0,
    in_place: Annotated[bool, typer.Option("--in-place", help="Free dense tensors early: less memory.")] = False,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Weights stay on disk; a run that stopped goes on."),
    ] = False,
    gguf_file: Gguf = None,
    quantization: Quantization = None,
) -> None:
    """Prune MODEL and write a checkpoint, its plan and its report to OUT; or one file, and these beside it."""
    with clear_errors():
        options = dict[str, Any](ratio=ratio, group_ratio=group_ratio, importance=importance, taylor=taylor, seed=seed)
        options.update(reduction=reduction, ranking=ranking, protect=protect, inplace=in_place, uniform=uniform)
        options.update(recipe=recipe, compensate=compensate, tune=tune, kinds=_names(kinds))
        options["round_to"] = _multiple(round_to, out)
        options["norm"] = norm or ("sliced" if out.suffix == ".gguf" else None)  # it has one epsilon for all norms
        windows = {"file": calibration, "samples": samples, "tokens": tokens}
        _run(model, out, options, windows, gguf_file, low_memory=low_memory, quantization=quantization)


def _run(
    model: str,
    out: Path,
    options: dict[str, Any],
    windows: dict[str, Any],
    gguf_file: str | None,
    *,
    low_memory: bool,
    quantization: str | None,
) -> None:
    """Load, prune and write.

    Args:
        model: what the user named.
        out: where to.
        options: of a prune.
        windows: the calibration text, how many samples are taken of it, and how long they are.
        gguf_file: in the folder.
        low_memory: whether weights stay on disk.
        quantization: of a GGUF file.
    """
    from fxprune.data.files import calibration_text, calibration_windows
    from fxprune.export.model import SUFFIXES

    file, most = windows["file"], windows["samples"]
    text = None if file is None else calibration_text(file)
    wanted = text is not None or (out.suffix == ".gguf" and not is_gguf(model))
    dense: Any = None
    if low_memory:  # the weights are not read here
        tokenizer = load_tokenizer(model, gguf_file, needed=wanted)
    else:
        dense, tokenizer = load(model, gguf_file, with_tokenizer=wanted)
    scored = options["importance"] or options["taylor"]
    published = options["recipe"] == "llm-pruner" or (options["recipe"] is None and scored)
    most = 10 if published and most is None else most  # ten are what the paper uses
    data = None if text is None else calibration_windows(tokenizer, text, most, windows["tokens"], str(file))
    if low_memory:
        options = {name: value for name, value in options.items() if name != "tune" or value is not None}
        result = fxprune.prune_checkpoint(model, out, data, tokenizer=tokenizer, track=progress, **options)
        _write_facts(result, out / "plan.json", out / "report.json")
        return _tell(result, out, loading=_OURS)
    result = fxprune.prune(dense, data, tokenizer=tokenizer, track=progress, **options)
    made = _write_file if out.suffix in SUFFIXES else _write
    return _tell(result, out, loading=made(result, tokenizer, out, like=model, quantization=quantization))


def _names(kinds: str | None) -> list[str] | None:
    return None if kinds is None else [kind.strip() for kind in kinds.split(",")]


def _write(result: fxprune.Result, tokenizer: Any, out: Path, **_: Any) -> str:
    """Write all there is to ``out``; returns how to load it."""
    from fxprune.data.ranks import first_alone

    if result.model is None:
        out.mkdir(parents=True, exist_ok=True)
        first_alone(partial(result.export, out / "model.pt2"), FxpruneError)
        loading = "there is no slim model of this class, torch.export.load runs model.pt2"
    elif result.save_pretrained(out, tokenizer).is_stock:
        loading = "any transformers loads it"
    else:
        loading = _OURS
    _write_facts(result, out / "plan.json", out / "report.json")
    return loading


def _write_file(result: fxprune.Result, tokenizer: Any, out: Path, *, like: str, quantization: str | None) -> str:
    """Write one file, with plan and report beside it; returns what runs it."""
    from fxprune.data.ranks import first_alone

    options = gguf_options(like, tokenizer, quantization) if out.suffix == ".gguf" else {"quantization": quantization}
    first_alone(partial(result.export, out, **options), FxpruneError)
    _write_facts(result, out.with_suffix(".plan.json"), out.with_suffix(".report.json"))
    return runs(out)


def _write_facts(result: fxprune.Result, plan: Path, report: Path) -> None:
    from fxprune.data.ranks import is_first

    if not is_first():
        return
    plan.write_text(result.plan.to_json(), encoding="utf-8")
    report.write_text(result.report.to_json(), encoding="utf-8")
    result.write_report(report.with_suffix(".html"))


def _multiple(round_to: str | None, out: Path) -> Any:
    """Return what widths are multiples of; those of MLPs fill the blocks of quantised types."""
    if round_to is None:
        return {"mlp": 32} if out.suffix == ".gguf" else 1
    return int(round_to) if round_to.strip().lstrip("+-").isdecimal() else round_to


def _tell(result: fxprune.Result, out: Path, loading: str) -> None:
    """Print the numbers, the widths that changed, and what the user should know, such as how to load the model."""
    from fxprune.data.ranks import is_first

    if not is_first():
        return
    report = result.report
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
