"""The commands that list installed passes and recipes."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from fxprune.cli import options as flags
from fxprune.cli.console import Command, QuickCommand, app, console, print_json, print_lines, print_table
from fxprune.errors import PassError
from fxprune.recipes.texts import comments_of, recipe_names, recipe_text

_FACTS = ("needs", "wants", "gives", "drops", "keeps")


@app.command(cls=Command)
def passes(
    name: Annotated[str | None, typer.Argument(help="Describe this pass.")] = None, as_json: flags.Json = False
) -> None:
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
        if as_json:
            print_json([dict(zip(("name", "stage", "summary"), row, strict=True)) for row in rows])
        else:
            print_table(("pass", "stage", "what it does"), rows)
        return
    step = load_pass(name)  # what a sequence needs and gives follows from its steps
    doc = plain(inspect.cleandoc(step.__doc__ or "").partition("\nArgs:")[0].rstrip())
    arguments = arguments_of(type(step))
    facts = {word: [kind.__name__ for kind in getattr(step, word)] for word in _FACTS}
    example = example_of(type(step))
    if as_json:
        listed = [dict(zip(("name", "default", "description"), row, strict=True)) for row in arguments]
        about = {"name": name, "stage": step.stage, "changes": step.changes, "description": doc}
        print_json({**about, "arguments": listed, **facts, "example": example})
        return
    print_lines([doc])
    if arguments:
        print_table(("argument", "default", "description"), arguments, lined=True)
    print_lines([f"stage: {step.stage}", f"changes: {step.changes}"])
    print_lines(f"{word}: {', '.join(kinds)}" for word, kinds in facts.items() if kinds)
    print_lines([f"in a pipeline: {example}"])


@app.command(cls=QuickCommand)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the passes of this recipe, to be edited in a file.")] = None,
    as_json: flags.Json = False,
) -> None:
    """List the recipes with their costs, or print one."""
    texts = {each: recipe_text(each) for each in (recipe_names() if name is None else (name,))}
    rows = [(each, *comments_of(text)) for each, text in texts.items()]
    if as_json:
        found = [dict(zip(("name", "summary", "costs"), row, strict=True)) for row in rows]
        print_json(found if name is None else {**found[0], "text": texts[name]})
    elif name is not None:
        console.print(texts[name], end="", highlight=False)
    else:
        print_table(("recipe", "what it does", "what it costs"), rows, lined=True)
