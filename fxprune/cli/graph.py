"""The commands that look at the groups of a model: list them, draw them, ask why."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

import fxprune
from fxprune.cli.console import Folder, Gguf, app, clear_errors, console, errors
from fxprune.cli.load import readable, where_and_file
from fxprune.errors import FxpruneError, UnknownNameError

__all__ = ["explain", "graph"]

_PICTURES = (".png", ".svg")


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
    with clear_errors():
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
    with clear_errors():
        dependencies = _graph(model, gguf_file)
        steps = fxprune.explain(dependencies, (parameter, axis), _group(dependencies, group))
    if not steps:
        console.print(f"{parameter}[{axis}] is the trigger of its group", markup=False, highlight=False)
    for step in steps:
        source, target = f"{step.source.tensor}[{step.source.dim}]", f"{step.target.tensor}[{step.target.dim}]"
        console.print(f"{source} -> {target}  by {step.op} (at {step.node})", markup=False, highlight=False)
        console.print(f"    {step.rule}", markup=False, highlight=False)


def _graph(model: str, gguf_file: str | None) -> Any:
    """The dependency graph of a model that is built on meta, from its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable(model):
        config = AutoConfig.from_pretrained(**where_and_file(model, gguf_file))
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
    from fxprune.discovery.explain import frozen_axes

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
            raise FxpruneError(
                f"graphviz failed: {done.stderr.strip().partition(chr(10))[0]}",
                where=str(text),
                remedy="Draw less, with --layer or --group, or draw the file by hand",
            )
    elif picture:
        errors.print(f"note: no graphviz here; wrote {text}, of which dot makes {path.name}", markup=False)
