"""The commands that list installed passes and recipes."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from fxprune.cli.console import Command, QuickCommand, app, console, print_lines, print_table
from fxprune.errors import PassError
from fxprune.recipes.texts import comments_of, recipe_names, recipe_text


@app.command(cls=Command)
def passes(name: Annotated[str | None, typer.Argument(help="Describe this pass.")] = None) -> None:
    """List the installed passes in the order of a pipeline, or describe one."""
    from fxprune.pipeline.registry import arguments_of, example_of, in_order, load_pass, pass_class, plain

    if name is None:
        rows = []
        for each in in_order():
            try:
                made = pass_class(each)
                rows.append((each, made.stage, plain((inspect.getdoc(made) or "").partition("\n")[0])))
            except PassError as error:
                rows.append((each, "", error.what))
        print_table(("pass", "stage", "what it does"), rows)
        return
    step = load_pass(name)  # what a sequence needs and gives follows from its steps
    doc = inspect.cleandoc(step.__doc__ or "").partition("\nArgs:")[0]
    print_lines([plain(doc.rstrip())])
    if arguments := arguments_of(type(step)):
        print_table(("argument", "default", "description"), arguments, lined=True)
    facts = {"needs": step.needs, "wants": step.wants, "gives": step.gives, "drops": step.drops, "keeps": step.keeps}
    print_lines([f"stage: {step.stage}", f"changes: {step.changes}"])
    print_lines(f"{word}: {', '.join(kind.__name__ for kind in kinds)}" for word, kinds in facts.items() if kinds)
    print_lines([f"in a pipeline: {example_of(type(step))}"])


@app.command(cls=QuickCommand)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the passes of this recipe, to be edited in a file.")] = None,
) -> None:
    """List the recipes with their costs, or print one."""
    if name is not None:
        console.print(recipe_text(name), end="", highlight=False)
        return
    rows = ((each, *comments_of(recipe_text(each))) for each in recipe_names())
    print_table(("recipe", "what it does", "what it costs"), rows, lined=True)
