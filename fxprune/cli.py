"""The command line: prune a model folder, look at its groups, ask why, list the passes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxprune
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.groups import frozen_axes
from fxprune.registry import load_pass

__all__ = ["app"]

app = typer.Typer(add_completion=False, help="Structural pruning of language models.", no_args_is_help=True)
console = Console()

Folder = Annotated[str, typer.Argument(help="Model folder, or id on a hub.")]


@app.command()
def prune(
    model: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    kinds: Annotated[str, typer.Option(help="Comma-separated kinds.")] = "mlp,head",
    importance: Annotated[str, typer.Option(help="taylor, l1, l2, random, or another installed pass.")] = "taylor",
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 128,
    seed: Annotated[int, typer.Option(help="For random importance.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder.")] = None,
) -> None:
    """Prune MODEL and write plan.json, report.json and, where stock transformers can load it, the model to OUT."""
    from transformers import AutoModelForCausalLM

    with _clear_errors():
        dense = AutoModelForCausalLM.from_pretrained(model, gguf_file=gguf_file)
        data = None if calibration is None else _samples(model, gguf_file, calibration, samples, tokens)
        chosen = tuple(kind.strip() for kind in kinds.split(","))
        result = fxprune.prune(
            dense, data, ratio=ratio, kinds=chosen, importance=importance, seed=seed, track=_progress
        )
        _write(result, out)
    console.print(result.report.table())
    for note in (*result.report.model_reasons, *result.report.notes):
        console.print(f"note: {note}", markup=False)
    if not _is_stock(result):
        console.print("note: no weights written, the layers differ; fxprune.apply(model, plan) makes the model again")
    console.print(f"ratio achieved {result.report.achieved:.2%}; written to {out}", markup=False)


@app.command()
def graph(
    model: Folder,
    dot: Annotated[Path | None, typer.Option(help="Write a picture: .dot, or .svg/.png with graphviz.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block to draw.")] = None,
    group: Annotated[str | None, typer.Option(help="Group to draw.")] = None,
) -> None:
    """List the groups of MODEL and its frozen axes; needs no weights."""
    with _clear_errors():
        dependencies = _graph(model)
        table = Table("group", "kind", "units", "members", "removal")
        for found in fxprune.find_groups(dependencies):
            removal = "renormalised" if found.renormalised else "exact"
            table.add_row(found.name, found.kind, str(found.size), str(len(found.members)), removal)
        console.print(table)
        for axis, reason in frozen_axes(dependencies).items():
            console.print(f"frozen {axis}: {reason}", markup=False)
        if dot is not None:
            _draw(dependencies, dot, layer, group)


@app.command()
def explain(model: Folder, parameter: str, axis: int) -> None:
    """Print the chain of ops that ties AXIS of PARAMETER to the trigger of its group."""
    with _clear_errors():
        for step in fxprune.explain(_graph(model), (parameter, axis)):
            source, target = step.source, step.target
            console.print(f"{source.tensor}[{source.dim}] -> {target.tensor}[{target.dim}]  by {step.op}", markup=False)


@app.command()
def passes() -> None:
    """List the installed passes."""
    table = Table("pass", "stage", "what it does")
    for name in fxprune.pass_names():
        loaded = load_pass(name)
        table.add_row(name, loaded.stage, (type(loaded).__doc__ or "").strip().splitlines()[0])
    console.print(table)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What is the user's to mend ends in one line and exit code 2."""
    try:
        yield
    except (FxpruneError, OSError, ValueError) as error:
        console.print(f"[red]error:[/red] {str(error).splitlines()[0]}")
        raise typer.Exit(2) from error


def _progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return track(items, what, total)


def _samples(model: str, gguf_file: str | None, path: Path, samples: int, tokens: int) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, gguf_file=gguf_file)
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    rows = min(samples, len(ids) // tokens)
    if rows == 0:
        raise CalibrationError(f"{len(ids)} tokens are fewer than one sample of {tokens}", where=str(path))
    return ids[: rows * tokens].view(rows, tokens)


def _graph(model: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return fxprune.dependency_graph(fxprune.trace(empty, dynamic=False))


def _draw(dependencies: Any, path: Path, layer: int | None, group: str | None) -> None:
    text = path.with_suffix(".dot")
    fxprune.write_dot(dependencies, text, layer=layer, group=group)
    program = shutil.which("dot")
    if path.suffix in (".svg", ".png") and program is not None:
        subprocess.run([program, f"-T{path.suffix[1:]}", str(text), "-o", str(path)], check=True)


def _write(result: fxprune.Result, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (out / "report.json").write_text(result.report.to_json(), encoding="utf-8")
    if _is_stock(result):
        result.model.save_pretrained(out)


def _is_stock(result: fxprune.Result) -> bool:
    """Whether stock transformers can load the slim model: all its layers are of one shape."""
    return result.model is not None and not result.model.fxprune_layer_fields
