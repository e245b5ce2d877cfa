"""The commands that look at plans: what one removes, and in what two differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from fxprune.cli.console import Json, app, clear_errors, console, print_json
from fxprune.cli.place import is_file
from fxprune.errors import FxpruneError, PlanError
from fxprune.pipeline.arguments import MANIFEST

if TYPE_CHECKING:
    from fxprune.removal.plan import Difference, Plan
    from fxprune.report.report import Report

__all__ = ["WrittenPlan", "diff", "read_plan", "show"]

plans = typer.Typer(help="Show what a plan removes, or in what two plans differ.")
app.add_typer(plans, name="plan")

_FILE, _REPORT = "plan.json", "report.json"

_REMEDY = "Name the plan.json that a prune wrote"

Source = Annotated[Path, typer.Argument(help="A plan.json, a folder that has one, or the file that a prune wrote.")]


@dataclass(frozen=True)
class WrittenPlan:
    """A plan that a prune wrote, and what it wrote beside it.

    Args:
        plan: the plan.
        report: the report; None where there is none.
    """

    plan: Plan
    report: Report | None = None


@plans.command()
def show(plan: Source, as_json: Json = False) -> None:
    """Print what PLAN removes, block by block."""
    with clear_errors():
        written = read_plan(plan)
        from fxprune.removal.plan import Plan, differences

        axes = differences(written.plan, Plan())
        widths = written.report.widths if written.report else {}
        blocks, norm = list(written.plan.removed_blocks), written.plan.norm
        if as_json:
            cut = [{"block": one.block, "axes": one.axes, "size": one.size, "removed": one.first} for one in axes]
            print_json({"norm": norm, "removed_blocks": blocks, "widths": widths, "axes": cut})
            return
        lines = [f"layer removed: {block}" for block in blocks]
        if widths:
            console.print(_widths_table(widths))
        elif axes:
            console.print(_axes_table(axes, ("removed", "first")))
            lines.append("note: there is no report.json beside the plan, so that these are axes of parameters")
        if not axes and not blocks:
            lines.append("the plan removes nothing")
        if written.report:
            dense, slim = written.report.parameters
            lines.append(f"parameters: {dense:,} to {slim:,}, {written.report.achieved:.2%} removed")
        lines.append(f"norms over units that go: {norm}")
        for line in lines:
            console.print(line, markup=False, highlight=False)


@plans.command()
def diff(first: Source, second: Source, as_json: Json = False) -> None:
    """Print what plan FIRST removes and SECOND keeps, and the other way round; exit with 1 where they differ."""
    with clear_errors():
        one, other = read_plan(first).plan, read_plan(second).plan
        from fxprune.removal.plan import differences

        axes = differences(one, other)
        removed = set(one.removed_blocks), set(other.removed_blocks)
        same = not axes and removed[0] == removed[1] and one.norm == other.norm
        if as_json:
            cut = [each.to_dict() for each in axes]
            blocks = {"first": sorted(removed[0] - removed[1]), "second": sorted(removed[1] - removed[0])}
            print_json({"same": same, "axes": cut, "removed_blocks": blocks, "norm": [one.norm, other.norm]})
        else:
            _tell_differences(axes, removed, (one.norm, other.norm))
    raise typer.Exit(0 if same else 1)


def read_plan(path: Path) -> WrittenPlan:
    """Return the plan that a user named, and the report beside it.

    Args:
        path: a file of a plan; a folder with ``plan.json`` or a checkpoint; or a file that a prune wrote, which has its
            plan beside it.

    Raises:
        PlanError: there is none, or it is something else.
    """
    if is_file(path):
        return _from_files(path.with_suffix(f".{_FILE}"), path.with_suffix(f".{_REPORT}"))
    if not path.is_dir():
        return _from_files(path, path.with_name(path.name.removesuffix(_FILE) + _REPORT))
    if (path / _FILE).is_file() or not (path / MANIFEST).is_file():
        return _from_files(path / _FILE, path / _REPORT)
    from fxprune.checkpoint.manifest import read_manifest

    manifest = read_manifest(path)
    try:
        plan, report = manifest.read_plan(), manifest.read_report()
    except PlanError as error:
        raise PlanError(error.what, where=str(path), remedy=_REMEDY) from error
    if plan is None:
        raise PlanError("the checkpoint was saved without a plan", where=str(path), remedy="Name a plan.json")
    return WrittenPlan(plan, report)


def _from_files(plan: Path, report: Path) -> WrittenPlan:
    if not plan.is_file():
        remedy = "Name a plan.json, a folder that has one, or the file that a prune wrote"
        raise PlanError("there is no plan", where=str(plan), remedy=remedy)
    parsed = _parsed(plan.read_text(encoding="utf-8", errors="replace"), plan)
    if not report.is_file() or report == plan:
        return WrittenPlan(parsed)
    from fxprune.report.report import Report

    try:
        return WrittenPlan(parsed, Report.from_dict(json.loads(report.read_text(encoding="utf-8"))))
    except (ValueError, FxpruneError) as error:
        raise PlanError("it is not a report", where=str(report), remedy="Take it away, or prune again") from error


def _parsed(text: str, path: Path) -> Plan:
    _check_text(text, path)
    from fxprune.removal.plan import Plan

    try:
        return Plan.from_json(text)
    except PlanError as error:
        raise PlanError(error.what, where=str(path), remedy=_REMEDY) from error


def _check_text(text: str, path: Path) -> None:
    """Refuse what is no JSON object, which can be told before anything is imported.

    Args:
        text: the text.
        path: where it is from.

    Raises:
        PlanError: it is something else.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PlanError(f"it is not JSON: {error}", where=str(path), remedy=_REMEDY) from error
    if not isinstance(found, dict):
        raise PlanError("it is JSON, and no plan", where=str(path), remedy=_REMEDY)


def _widths_table(widths: Mapping[str, tuple[int, int]]) -> Table:
    """One row a block, one column a kind; what a plan leaves of each, and the sums below."""
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
        sums.append(f"{1 - after / before:.1%} of {before:,} gone")
    table.add_row("in all of these", *sums)
    return table


def _axes_table(axes: tuple[Difference, ...], *counts: tuple[str, str]) -> Table:
    table = Table("block", Column("parameters", overflow="fold"), "size", *(title for title, _ in counts))
    for one in axes:
        numbers = (f"{getattr(one, field):,}" for _, field in counts)
        more = f" and {len(one.axes) - 1} more" if len(one.axes) > 1 else ""
        table.add_row(one.block, f"{one.axes[0]}{more}", f"{one.size:,}", *numbers)
    return table


def _tell_differences(axes: tuple[Difference, ...], removed: tuple[set[str], set[str]], norms: tuple[str, str]) -> None:
    """Print in what two plans differ, or that they do not."""
    if axes:
        console.print(_axes_table(axes, ("first alone", "first"), ("second alone", "second"), ("both", "both")))
    lines = [f"layer removed by the first alone: {block}" for block in sorted(removed[0] - removed[1])]
    lines += [f"layer removed by the second alone: {block}" for block in sorted(removed[1] - removed[0])]
    if norms[0] != norms[1]:
        lines.append(f"norms over units that go: {norms[0]} by the first, {norms[1]} by the second")
    for line in lines if lines or axes else ["the plans remove the same"]:
        console.print(line, markup=False, highlight=False)
