"""The command line: prune a model folder, look at its groups, ask why, list the passes."""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table

import fxprune
from fxprune.data.files import calibration_text, calibration_windows
from fxprune.discovery.explain import frozen_axes
from fxprune.errors import FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.contract import STAGES
from fxprune.pipeline.registry import pass_class
from fxprune.recipes import read_recipe, recipe_names

__all__ = ["app"]

app = typer.Typer(add_completion=False, help="Structural pruning of language models.", no_args_is_help=True)
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

_LONGEST_ERROR = 600
_PICTURES = (".png", ".svg")

Folder = Annotated[str, typer.Argument(help="Model folder, or id on a hub.")]
Gguf = Annotated[str | None, typer.Option(help="GGUF file inside the folder.")]


@app.command()
def prune(
    model: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
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
    round_to: Annotated[int, typer.Option(help="Widths stay multiples of this.")] = 1,
    uniform: Annotated[bool, typer.Option("--uniform", help="Equal layers, for a stock checkpoint.")] = False,
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
    gguf_file: Gguf = None,
) -> None:
    """Prune MODEL and write a checkpoint, plan.json and report.json to OUT."""
    with _clear_errors():
        options = dict[str, Any](ratio=ratio, group_ratio=group_ratio, importance=importance, taylor=taylor, seed=seed)
        options.update(
            recipe=recipe,
            kinds=None if kinds is None else [kind.strip() for kind in kinds.split(",")],
            reduction=reduction,
            ranking=ranking,
            protect=protect,
            round_to=round_to,
            inplace=in_place,
            uniform=uniform,
            compensate=compensate,
            tune=tune,
        )
        text = None if calibration is None else calibration_text(calibration)
        dense, tokenizer = _load(model, gguf_file, with_tokenizer=text is not None)
        published = recipe == "llm-pruner" or (recipe is None and (importance or taylor))
        most = 10 if published and samples is None else samples  # ten are what the paper uses
        data = None if text is None else calibration_windows(tokenizer, text, most, tokens, str(calibration))
        result = fxprune.prune(dense, data, tokenizer=tokenizer, track=_progress, **options)
        _tell(result, out, loading=_write(result, tokenizer, out))


@app.command()
def graph(
    model: Folder,
    dot: Annotated[Path | None, typer.Option(help="Write a picture: .dot, or .svg/.png with graphviz.")] = None,
    layer: Annotated[str | None, typer.Option(help="Block to draw: its index, or a module path.")] = None,
    group: Annotated[str | None, typer.Option(help="Group to draw.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Draw the whole model.")] = False,
    gguf_file: Gguf = None,
) -> None:
    """List the groups of MODEL and its frozen axes; needs the config alone."""
    with _clear_errors():
        dependencies = _graph(model, gguf_file)
        if dot is not None:
            _draw(dependencies, dot, layer=layer, group=group, everything=everything)
    console.print(_groups_table(fxprune.find_groups(dependencies)))
    for line in _frozen_lines(dependencies):
        console.print(line, markup=False, highlight=False)


@app.command()
def explain(
    model: Folder,
    parameter: Annotated[str, typer.Argument(help="Name of a parameter or buffer.")],
    axis: Annotated[int, typer.Argument(help="Which of its axes, from 0.")],
    group: Annotated[str | None, typer.Option(help="Group meant, where the axis is in several.")] = None,
    gguf_file: Gguf = None,
) -> None:
    """Print the chain of ops that ties AXIS of PARAMETER to the trigger of its group."""
    with _clear_errors():
        dependencies = _graph(model, gguf_file)
        steps = fxprune.explain(dependencies, (parameter, axis), _group(dependencies, group))
    if not steps:
        console.print(f"{parameter}[{axis}] is the trigger of its group", markup=False, highlight=False)
    for step in steps:
        source, target = f"{step.source.tensor}[{step.source.dim}]", f"{step.target.tensor}[{step.target.dim}]"
        console.print(f"{source} -> {target}  by {step.op} (at {step.node})", markup=False, highlight=False)
        console.print(f"    {step.rule}", markup=False, highlight=False)


@app.command()
def passes() -> None:
    """List the installed passes."""
    table = Table("pass", "stage", "what it does")
    found = [_described(name) for name in fxprune.pass_names()]
    order = {stage: i for i, stage in enumerate(STAGES)}
    for row in sorted(found, key=lambda row: order.get(row[1], len(order))):
        table.add_row(*row)
    console.print(table)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the passes of this one, to be edited in a file.")] = None,
) -> None:
    """List the recipes with what they cost, or print one."""
    if name is not None:
        with _clear_errors():
            console.print(str(read_recipe(name)), end="", markup=False, highlight=False)
        return
    table = Table("recipe", "what it does", "what it costs")
    for recipe in map(read_recipe, recipe_names()):
        table.add_row(recipe.name, recipe.summary, recipe.costs, end_section=True)
    console.print(table)


def _described(name: str) -> tuple[str, str, str]:
    """Name, stage and first line of a pass; of one that cannot be imported, why."""
    try:
        made = pass_class(name)
    except PassError as error:
        return name, "", escape(error.what)
    return name, made.stage, (inspect.getdoc(made) or "").partition("\n")[0]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What is the user's to mend ends in one line and exit code 2."""
    try:
        yield
    except (FxpruneError, OSError) as error:
        text = textwrap.shorten(str(error), _LONGEST_ERROR, placeholder=" ...")
        errors.print(f"[red]error: {escape(text)}[/red]", highlight=False)
        raise typer.Exit(2) from error


def _progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return track(items, what, total, console=errors, transient=True)


def _load(model: str, gguf_file: str | None, *, with_tokenizer: bool) -> tuple[Any, Any]:
    """The dense model, and its tokenizer; None where there is none and none is needed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _readable(model):
        dense = AutoModelForCausalLM.from_pretrained(model, gguf_file=gguf_file)
    tokenizer = None
    with _readable(model) if with_tokenizer else contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(model, gguf_file=gguf_file)
    return dense, tokenizer


@contextlib.contextmanager
def _readable(model: str) -> Iterator[None]:
    """What transformers says of a folder that it cannot read, in one line."""
    remedy = "Pass a folder that save_pretrained wrote, or a hub id"
    if model.startswith(("/", ".", "~")) and not Path(model).exists():
        raise FxpruneError("no such folder", where=model, remedy=remedy)
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FxpruneError(f"cannot be loaded: {reason}", where=model, remedy=remedy) from error


def _graph(model: str, gguf_file: str | None) -> Any:
    """The dependency graph of a model that is built on meta, from its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable(model):
        config = AutoConfig.from_pretrained(model, gguf_file=gguf_file)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    return fxprune.dependency_graph(fxprune.trace(empty, dynamic=False))


def _groups_table(groups: Iterable[fxprune.Group]) -> Table:
    """One row for the groups that are alike in every block, with ``*`` for the number of the block."""
    counts: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        removal = "renormalised" if group.renormalised else "exact"
        members = dict.fromkeys(".".join(_starred(f"{m.name}[{m.axis}]").split(".")[-2:]) for m in group.members)
        held = "all parameters" if group.factor is None else ", ".join(members)
        counts[_starred(group.name), f"{group.size:,}", removal, held] += 1
    first, last = Column("group (where/kind)", overflow="fold"), Column("members", overflow="fold")
    table = Table(first, "count", "units", "removal", last)
    for (name, units, removal, held), count in counts.items():
        table.add_row(name, f"{count:,}", units, removal, held, end_section=True)
    return table


def _frozen_lines(dependencies: Any) -> list[str]:
    axes = frozen_axes(dependencies).items()
    counts = Counter(f"frozen {_starred(axis)}: {freeze.reason}" for axis, freeze in axes)
    return [line if n == 1 else f"{line} ({n:,} axes)" for line, n in counts.items()]


def _starred(name: str) -> str:
    """``name`` with ``*`` for the numbers in its module path."""
    path, slash, kind = name.partition("/")
    return re.sub(r"\.\d+(?=\.|$)", ".*", path) + slash + kind


def _group(dependencies: Any, name: str | None) -> fxprune.Group | None:
    if name is None:
        return None
    groups = {group.name: group for group in fxprune.find_groups(dependencies)}
    if name not in groups:
        raise UnknownNameError("group", name, groups)
    return groups[name]


def _draw(dependencies: Any, path: Path, **what: Any) -> None:
    """Write the DOT file; for a name that ends in .png or .svg the picture too, beside it."""
    picture = path.suffix if path.suffix in _PICTURES else ""
    text = path.with_suffix(".dot") if picture else path
    fxprune.write_dot(dependencies, text, **what)
    program = shutil.which("dot")
    if picture and program is not None:
        command = [program, f"-T{picture[1:]}", str(text), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FxpruneError(f"graphviz failed: {done.stderr.strip().partition(chr(10))[0]}", where=str(text))
    elif picture:
        errors.print(f"note: no graphviz here; wrote {text}, of which dot makes {path.name}", markup=False)


def _write(result: fxprune.Result, tokenizer: Any, out: Path) -> str:
    """Write all there is to ``out``; returns how to load it."""
    if result.model is None:
        out.mkdir(parents=True, exist_ok=True)
        result.export(out / "model.pt2")
        loading = "there is no slim model of this class, torch.export.load runs model.pt2"
    elif result.save_pretrained(out, tokenizer).is_stock:
        loading = "any transformers loads it"
    else:
        loading = "fxprune.from_pretrained loads it, and transformers with trust_remote_code=True"
    (out / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    (out / "report.json").write_text(result.report.to_json(), encoding="utf-8")
    return loading


def _tell(result: fxprune.Result, out: Path, loading: str) -> None:
    """Print the numbers, the widths that changed, and what the user should know, such as how to load the model."""
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
