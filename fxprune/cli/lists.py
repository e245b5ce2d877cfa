"""The commands that list what is installed: passes and recipes."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import fxprune
from fxprune.cli.checks import check_pass_name, check_recipe_name
from fxprune.cli.console import app, clear_errors, console
from fxprune.errors import PassError

__all__ = ["passes", "recipes"]


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.")] = None,
) -> None:
    """List the installed passes in the order of a pipeline, or tell all about one."""
    if name is not None:
        with clear_errors():
            check_pass_name(name)
            _tell_pass(name)
        return
    from fxprune.pipeline.registry import in_order

    table = Table("pass", "stage", "what it does")
    for each in in_order(fxprune.pass_names()):
        table.add_row(*_described(each))
    console.print(table)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the passes of this one, to be edited in a file.")] = None,
) -> None:
    """List the recipes with what they cost, or print one."""
    if name is not None:
        with clear_errors():
            check_recipe_name(name)
    from fxprune.recipes import read_recipe, recipe_names

    if name is not None:
        console.print(str(read_recipe(name)), end="", markup=False, highlight=False)
        return
    table = Table("recipe", "what it does", "what it costs")
    for recipe in map(read_recipe, recipe_names()):
        table.add_row(recipe.name, recipe.summary, recipe.costs, end_section=True)
    console.print(table)


def _tell_pass(name: str) -> None:
    """Print what a pass does and takes, what it needs and gives, and an example of its text."""
    from fxprune.pipeline.registry import arguments_of, example_of, load_pass, plain

    step = load_pass(name)
    made = type(step)
    said = inspect.cleandoc(made.__doc__ or "").partition("\nArgs:")[0]
    console.print(plain(said.rstrip()), markup=False, highlight=False)
    arguments = arguments_of(made)
    if arguments:
        table = Table("argument", "default", "what it is")
        for one in arguments:
            table.add_row(one.name, escape(one.default), escape(one.doc), end_section=True)
        console.print(table)
    facts = {"needs": step.needs, "gives": step.gives, "drops": step.drops, "keeps": step.keeps}
    lines = [f"{word}: {', '.join(kind.__name__ for kind in kinds)}" for word, kinds in facts.items() if kinds]
    for line in (f"stage: {made.stage}", f"changes: {made.changes}", *lines, f"in a pipeline: {example_of(made)}"):
        console.print(line, markup=False, highlight=False)


def _described(name: str) -> tuple[str, str, str]:
    """Name, stage and first line of a pass; of one that cannot be imported, why."""
    from fxprune.pipeline.registry import pass_class, plain

    try:
        made = pass_class(name)
    except PassError as error:
        return name, "", escape(error.what)
    return name, made.stage, plain((inspect.getdoc(made) or "").partition("\n")[0])
