"""The commands that show plans: the removals of one, and the differences of two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from fxprune.cli import options as flags
from fxprune.cli.config import is_file
from fxprune.cli.console import QuickCommand, app, console, print_json, print_lines, print_table
from fxprune.errors import PlanError

if TYPE_CHECKING:
    from fxprune.removal.plan import Difference, Plan

plans = typer.Typer(help="Show what a plan removes, or how two plans differ.")
app.add_typer(plans, name="plan")

_FILE, _REPORT = "plan.json", "report.json"
_REMEDY = "Name the plan.json that a prune wrote"

Source = Annotated[Path, typer.Argument(help="A plan.json, a folder that has one, or the file that a prune wrote.")]


@dataclass(frozen=True)
class WrittenPlan:
    """A plan that a prune wrote, and of the report beside it, if any, widths and parameters before and after."""

    plan: Plan
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    parameters: tuple[int, int] | None = None


@plans.command(cls=QuickCommand)
def show(plan: Source, as_json: flags.Json = False) -> None:
    """Print what PLAN removes, block by block."""
    from fxprune.removal.plan import Plan, differences

    written = read_plan(plan)
    axes, widths = differences(written.plan, Plan()), written.widths
    blocks, norm, tokens = list(written.plan.removed_blocks), written.plan.norm, list(written.plan.vocabulary)
    if as_json:
        cut = [{"block": one.block, "axes": one.axes, "size": one.size, "removed": one.first} for one in axes]
        print_json({"norm": norm, "removed_blocks": blocks, "widths": widths, "axes": cut, "vocabulary": tokens})
        return
    lines = [f"layer removed: {block}" for block in blocks]
    if widths:
        console.print(_widths_table(widths))
    elif axes:
        _print_axes(axes, ("removed", "first"))
        lines.append("note: there is no report.json beside the plan, so these are axes of parameters")
    if tokens:
        lines.append(f"tokens that stay: {len(tokens):,}")
    if not (axes or blocks or tokens):
        lines.append("the plan removes nothing")
    if written.parameters:
        dense, slim = written.parameters
        lines.append(f"parameters: {dense:,} to {slim:,}, {1 - slim / dense:.2%} removed")
    print_lines([*lines, f"norms over removed units: {norm}"])


@plans.command(cls=QuickCommand)
def diff(first: Source, second: Source, as_json: flags.Json = False) -> None:
    """Print what only plan FIRST or only plan SECOND removes; exit with 1 if they differ."""
    from fxprune.removal.plan import differences

    one, other = read_plan(first).plan, read_plan(second).plan
    axes = differences(one, other)
    sides = {"first": (one, other), "second": (other, one)}
    blocks = {name: sorted({*a.removed_blocks} - {*b.removed_blocks}) for name, (a, b) in sides.items()}
    tokens = {name: len({*a.vocabulary} - {*b.vocabulary}) for name, (a, b) in sides.items()}
    same = not axes and not any(blocks.values()) and (one.norm, one.vocabulary) == (other.norm, other.vocabulary)
    if as_json:
        norms, cut = [one.norm, other.norm], [each.to_dict() for each in axes]
        print_json({"same": same, "axes": cut, "removed_blocks": blocks, "norm": norms, "tokens": tokens})
        raise typer.Exit(int(not same))
    if axes:
        _print_axes(axes, ("only first", "first"), ("only second", "second"), ("both", "both"))
    lines = ["the plans remove the same"] if same else []
    for plan, alone in blocks.items():
        lines += [f"layer removed only by the {plan}: {block}" for block in alone]
    if one.vocabulary != other.vocabulary:
        kept = (f"{len(plan.vocabulary):,}" if plan.vocabulary else "all" for plan in (one, other))
        lines.append("tokens that stay: {} in the first, {} in the second".format(*kept))
    if one.norm != other.norm:
        lines.append(f"norms over removed units: {one.norm} in the first, {other.norm} in the second")
    print_lines(lines)
    raise typer.Exit(int(not same))


def read_plan(path: Path) -> WrittenPlan:
    """The plan that a user named, by its file, its folder or the file beside it, with the report if there is one."""
    if is_file(path):
        return _from_files(path.with_suffix(f".{_FILE}"), path.with_suffix(f".{_REPORT}"))
    if not path.is_dir():
        return _from_files(path, path.with_name(path.name.removesuffix(_FILE) + _REPORT))
    return _from_files(path / _FILE, path / _REPORT)


def _from_files(path: Path, report: Path) -> WrittenPlan:
    from fxprune.removal.plan import Plan

    if not path.is_file():
        remedy = "Name a plan.json, a folder that has one, or the file that a prune wrote"
        raise PlanError("there is no plan", where=str(path), remedy=remedy)
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except PlanError as error:
        raise PlanError(error.what, where=str(path), remedy=_REMEDY) from error
    if not report.is_file() or report == path:
        return WrittenPlan(plan)
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
        return WrittenPlan(plan, {name: _pair(of) for name, of in data["widths"].items()}, _pair(data["parameters"]))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise PlanError("it is not a report", where=str(report), remedy="Remove it, or prune again") from error


def _pair(value: Any) -> tuple[int, int]:
    """Two whole numbers, the first above 0; a ValueError for anything else."""
    before, after = value
    if not (type(before) is type(after) is int and before > 0 and after >= 0):
        raise ValueError(value)
    return before, after


def _widths_table(widths: Mapping[str, tuple[int, int]]) -> Table:
    """A row for each block, a column for each kind, and the sums below."""
    kinds = list(dict.fromkeys(name.rpartition("/")[2] for name in widths))
    table = Table("", *kinds)
    for block in dict.fromkeys(name.rpartition("/")[0] for name in widths):
        found = (widths.get(f"{block}/{kind}") for kind in kinds)
        table.add_row(block, *("" if width is None else f"{width[0]:,} to {width[1]:,}" for width in found))
    table.add_section()
    sums = []
    for kind in kinds:
        of_kind = [width for name, width in widths.items() if name.rpartition("/")[2] == kind]
        before, after = (sum(side) for side in zip(*of_kind, strict=True))
        sums.append(f"{1 - after / before:.1%} of {before:,} removed")
    table.add_row("all of these", *sums)
    return table


def _print_axes(axes: tuple[Difference, ...], *counts: tuple[str, str]) -> None:
    rows = []
    for one in axes:
        more = f" and {len(one.axes) - 1} more" if len(one.axes) > 1 else ""
        numbers = (f"{getattr(one, field):,}" for _, field in counts)
        rows.append((one.block, f"{one.axes[0]}{more}", f"{one.size:,}", *numbers))
    print_table(("block", Column("parameters", overflow="fold"), "size", *(title for title, _ in counts)), rows)
