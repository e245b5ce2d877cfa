"""The commands that look at the groups of a model: list, draw and explain them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column

import fxprune
from fxprune.cli import options as flags
from fxprune.cli.console import Command, app, print_json, print_lines, print_table
from fxprune.cli.models import check_model, locate_model
from fxprune.cli.plan import read_plan
from fxprune.errors import ArgumentError

_NORM = "Norms over removed units: masked, as with these zeroed (the default), or sliced."
Norm = Annotated[Literal["sliced", "masked"] | None, typer.Option(help=_NORM)]
_DOT = "Write a picture: .html, .dot, or with Graphviz .svg, .png, .pdf."
_PLAN = "Show in the picture what this plan removes: its file, or the folder of a slim model."


@app.command(cls=Command)
def graph(
    model: flags.Folder,
    dot: Annotated[Path | None, typer.Option(help=_DOT)] = None,
    layer: Annotated[str | None, typer.Option(help="Block to draw: its index, or a module path.")] = None,
    group: Annotated[str | None, typer.Option(help="Group to draw.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Draw the whole model, equal blocks once.")] = False,
    no_fold: Annotated[bool, typer.Option("--no-fold", help="Draw each of several equal blocks.")] = False,
    plan: Annotated[Path | None, typer.Option(help=_PLAN)] = None,
    norm: Norm = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print groups and frozen axes as JSON.")] = False,
    gguf_file: flags.Gguf = None,
) -> None:
    """List the groups of MODEL and its frozen axes, from its config alone."""
    from fxprune.discovery.dependency import axis_map
    from fxprune.discovery.explain import frozen_axes
    from fxprune.draw.write import check_target
    from fxprune.graph.tensors import starred

    drawn = {"--layer": layer, "--group": group, "--everything": everything, "--no-fold": no_fold, "--plan": plan}
    given = [option for option, value in drawn.items() if value]
    if dot is None and given:
        raise ArgumentError("needs a picture to be drawn in", where=given[0], remedy="Add --dot FILE")
    if everything and (layer or group):
        raise ArgumentError("cannot be given with --everything", where=given[0], remedy="Leave one of them out")
    if dot is not None:
        check_target(dot)
    check_model(model, gguf_file)
    removal = None if plan is None else read_plan(plan).plan
    dependencies = _dependencies(model, gguf_file, norm or (removal.norm if removal else "masked"))
    if dot is not None:
        fxprune.write_dot(dependencies, dot, layer, group, everything=everything, plan=removal, fold=not no_fold)
    groups, frozen = fxprune.find_groups(dependencies), frozen_axes(dependencies)
    if as_json:
        print_json(_as_data(axis_map(dependencies), groups, frozen))
        return
    _print_groups(axis_map(dependencies), groups)
    counts = Counter(f"frozen {starred(axis)}: {freeze.reason}" for axis, freeze in frozen.items())
    print_lines(line if n == 1 else f"{line} ({n:,} axes)" for line, n in counts.items())


@app.command(cls=Command)
def explain(
    model: flags.Folder,
    name: Annotated[str, typer.Argument(help="Parameter, buffer or group, or the end of its name.")],
    axis: Annotated[int | None, typer.Argument(help="Axis of the parameter, from 0.")] = None,
    group: Annotated[str | None, typer.Option(help="Group, if the axis is in several.")] = None,
    norm: Norm = None,
    gguf_file: flags.Gguf = None,
) -> None:
    """Print the chain of ops that ties an axis to the trigger of its group, or a group with all its axes."""
    check_model(model, gguf_file)
    dependencies = _dependencies(model, gguf_file, norm or "masked")
    found = _group_lines(dependencies, name) if "/" in name else _axis_lines(dependencies, name, axis, group)
    print_lines([*found])


def _dependencies(model: str, gguf_file: str | None, norm: str) -> Any:
    from fxprune.checkpoint.read import load_config_only

    empty = load_config_only(locate_model(model), gguf_file)
    return fxprune.dependency_graph(fxprune.trace(empty, dynamic=False), norm)


def _print_groups(axes: Any, groups: Sequence[fxprune.Group]) -> None:
    """Print a row for the groups that are alike in every block, with ``*`` for the number of the block."""
    from fxprune.discovery.explain import exactness
    from fxprune.draw.view import REMOVAL
    from fxprune.graph.tensors import starred

    counts: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        members = dict.fromkeys(".".join(starred(str(m)).split(".")[-2:]) for m in group.members)
        held = "all parameters" if group.factor is None else ", ".join(members)
        counts[starred(group.name), f"{group.size:,}", REMOVAL[exactness(axes, group)], held] += 1
    first, last = Column("group (where/kind)", no_wrap=True), Column("members", overflow="fold")
    rows = ((name, f"{count:,}", *more) for (name, *more), count in counts.items())
    print_table((first, "count", "units", "removal", last), rows, lined=True)


def _as_data(axes: Any, groups: Sequence[fxprune.Group], frozen: Mapping[str, Any]) -> dict[str, Any]:
    from fxprune.discovery.explain import exactness

    rows = [
        {
            "name": group.name,
            "kind": group.kind,
            "units": group.size,
            "least": group.least,
            "block": group.block,
            "removal": exactness(axes, group),
            "renormalised_by": list(group.renormalised),
            "trigger": None if group.trigger is None else f"{group.trigger.tensor}[{group.trigger.dim}]",
            "members": [str(m) if group.factor else m.name for m in group.members],
        }
        for group in groups
    ]
    kept = [{"axis": axis, "reason": freeze.reason, "node": freeze.node} for axis, freeze in frozen.items()]
    return {"norm": axes.norm, "blocks": list(axes.blocks), "groups": rows, "frozen": kept}


def _axis_lines(dependencies: Any, name: str, dim: int | None, wanted: str | None) -> Iterator[str]:
    """The group that an axis is in, and the chain of ops from the trigger of the group."""
    from fxprune.discovery.explain import find_axis, find_group, groups_of

    axis = find_axis(dependencies, name, dim)
    found = groups_of(dependencies, axis)
    group = find_group(found, wanted) if wanted and found else next(iter(found), None)
    steps = fxprune.explain(dependencies, axis, group)
    assert group is not None  # explain refuses an axis that is in none
    yield f"{axis.tensor}[{axis.dim}] is in {_describe(dependencies, group)}"
    if others := [other.name for other in found if other != group]:
        yield f"and in {', '.join(others)}: select one with --group"
    if not steps:
        yield f"{axis.tensor}[{axis.dim}] is the trigger of its group"
    for step in steps:
        source, target = f"{step.source.tensor}[{step.source.dim}]", f"{step.target.tensor}[{step.target.dim}]"
        yield f"{source} -> {target}  by {step.op} (at {step.node})"
        yield f"    {step.rule}"


def _group_lines(dependencies: Any, name: str) -> Iterator[str]:
    """A group, and each axis in it with the ops on the way from the trigger."""
    from fxprune.discovery.explain import find_group
    from fxprune.rules.registry import moves_values

    group = find_group(fxprune.find_groups(dependencies), name)
    yield _describe(dependencies, group)
    if group.factor is None or group.trigger is None:
        yield from (f"    {member.name}" for member in group.members)
        return
    yield f"    {group.trigger.tensor}[{group.trigger.dim}]  the trigger"
    for member in group.members:
        steps = fxprune.explain(dependencies, (member.name, member.axis), group)
        if ops := [step.op for step in steps if not moves_values(step.op)]:
            yield f"    {member}  by {', '.join(ops)}"


def _describe(dependencies: Any, group: fxprune.Group) -> str:
    """Describe a group: its kind, its units, and whether their removal is exact."""
    from fxprune.discovery.dependency import axis_map
    from fxprune.discovery.explain import exactness

    axes = axis_map(dependencies)
    if group.renormalised:
        nodes = group.renormalised[:3]
        effect = f"renormalised: {', '.join(nodes)} take a statistic over the units, then over those that stay"
        removal = "; ".join((effect, *dict.fromkeys(axes.unkept[node] for node in nodes if node in axes.unkept)))
    elif exactness(axes, group) == "masked":
        removal = "exact: norms over the units are kept as with these masked"
    else:
        removal = "exact: the same as masking"
    units = "the whole block" if group.factor is None else f"{group.size:,} units"
    return f"group {group.name}: {group.kind}, {units}; {removal}"
