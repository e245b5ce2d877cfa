"""The commands that list what is installed: passes and recipes."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import fxprune
from fxprune.cli.console import app, clear_errors, console
from fxprune.errors import PassError

__all__ = ["passes", "recipes"]


@app.command()
def passes() -> None:
    """List the installed passes."""
    from fxprune.pipeline.contract import STAGES

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
    from fxprune.recipes import read_recipe, recipe_names

    if name is not None:
        with clear_errors():
            console.print(str(read_recipe(name)), end="", markup=False, highlight=False)
        return
    table = Table("recipe", "what it does", "what it costs")
    for recipe in map(read_recipe, recipe_names()):
        table.add_row(recipe.name, recipe.summary, recipe.costs, end_section=True)
    console.print(table)


def _described(name: str) -> tuple[str, str, str]:
    """Name, stage and first line of a pass; of one that cannot be imported, why."""
    from fxprune.pipeline.registry import pass_class

    try:
        made = pass_class(name)
    except PassError as error:
        return name, "", escape(error.what)
    return name, made.stage, (inspect.getdoc(made) or "").partition("\n")[0]
