"""Write docs/options.md and the tables of docs/passes.md from the declarations: `python -m tests.reference_tables`."""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

import fxprune
from fxprune.cli import app
from fxprune.graph.facts import Fact, facts_of
from fxprune.pipeline.arguments import declared, default_of, spelled_fields
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.registry import load_pass, pass_names
from fxprune.recipes import option_table
from fxprune.trace import trace
from tests.models import tiny

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS, PASSES = DOCS / "options.md", DOCS / "passes.md"

INTRODUCTION = """# Options

Written by `python -m tests.reference_tables` from the declarations in the code.

## Options of a prune

Keyword arguments of `fxprune.prune`, `fxprune.prune_pipeline` and `fxprune.prune_checkpoint`, with the corresponding
options of `fxprune prune`. An omitted option is as the [recipe](recipes.md) has it.
"""

ARGUMENTS = """## Arguments of passes

In recipes and pipelines, as in `wanda{samples=64}`; `fxprune passes NAME` prints those of one pass. Data and objects
cannot be written as text and are passed from Python. [Passes](passes.md) describes the passes themselves.
"""


def options_page() -> str:
    """The text of docs/options.md."""
    options = _table(("option", "command line", "default", "meaning"), _option_rows(deprecated=False))
    old = _table(("option", "meaning"), [(row[0], row[3]) for row in _option_rows(deprecated=True)])
    parts = [INTRODUCTION, options, "### Deprecated\n", old, ARGUMENTS]
    for stage in STAGES:
        rows = list(_argument_rows(step for step in registered() if step.stage == stage))
        if rows:
            parts += [f"### {stage.capitalize()}\n", _table(("argument", "default", "passes", "meaning"), rows)]
    return "\n".join(parts)


def passes_page() -> str:
    """The text of docs/passes.md with its tables written again."""
    text = PASSES.read_text(encoding="utf-8")
    for name, table in (("passes", passes_table()), ("facts", facts_table())):
        start, end = f"<!-- {name}: written by python -m tests.reference_tables -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def passes_table() -> str:
    """All passes of this package with the facts that they read and make."""
    rows = []
    for step in registered():
        kinds = (_names(kind.__name__ for kind in facts) for facts in (step.needs, step.wants, step.gives, step.drops))
        name = f"{step.name}{{verify}}" if getattr(step, "verify", False) else step.name
        rows.append((f"`{name}`", step.stage, *kinds, step.changes, _names(one.name for one in spelled_fields(step))))
    return _table(("pass", "stage", "needs", "wants", "gives", "drops", "changes", "arguments"), rows)


def facts_table() -> str:
    """All facts that tracing gives or a pass declares."""
    kinds = [type(fact) for fact in facts_of(trace(tiny("llama", num_hidden_layers=1)).graph_module)]
    for step in registered():
        kinds += [*step.needs, *step.wants, *step.gives, *step.drops]
    rows = [
        (f"`{_import_name(kind)}`", _first_line(kind), "" if kind.about == "nothing" else kind.about)
        for kind in dict.fromkeys(kinds)
    ]
    return _table(("fact", "meaning", "stale after a change of"), rows)


def registered() -> list[Pass]:
    """The passes of this package, by stage and name; one that verifies gives more facts, and is listed with both."""
    names = [name for stage in STAGES for name in pass_names(stage)]
    found = [step for step in map(load_pass, names) if type(step).__module__.startswith("fxprune.")]
    return [one for step in found for one in (step, *_with_verify(step))]


def _with_verify(step: Pass) -> list[Pass]:
    verifies = any(one.name == "verify" for one in spelled_fields(step))
    return [load_pass(step.name, verify=True)] if verifies else []


def _option_rows(*, deprecated: bool) -> Iterator[tuple[str, ...]]:
    command: Any = typer.main.get_command(app)
    flags = {
        parameter.name: max(parameter.secondary_opts or parameter.opts, key=len)
        for parameter in command.commands["prune"].params
        if parameter.opts[0].startswith("--")
    }
    for name, (_, declaration) in option_table().items():
        if declaration.doc.startswith("Deprecated") is deprecated:
            flag = f"`{flags[name]}`" if name in flags else ""
            yield f"`{name}`", flag, _default(declaration.default), _cell(declaration.doc)


def _argument_rows(steps: Iterable[Pass]) -> Iterator[tuple[str, ...]]:
    """One row for each argument, with the passes that share its declaration."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        for one in spelled_fields(step):
            owners = found.setdefault((one.name, _default(default_of(one)), _cell(declared(one).doc)), [])
            owners += [] if step.name in owners else [step.name]
    for (name, default, doc), owners in found.items():
        yield f"`{name}`", default, _names(owners), doc


def _default(value: Any) -> str:
    return "" if value is None or value in ("", ()) else f"`{value!r}`".replace("'", '"')


def _cell(doc: str) -> str:
    """A docstring as the cell of a Markdown table."""
    doc = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(doc.split()))
    return doc.replace("``", "`").replace("|", "\\|")


def _first_line(kind: type[Fact]) -> str:
    return _cell((inspect.getdoc(kind) or "").split("\n\n")[0]).rstrip(".")


def _import_name(kind: type[Fact]) -> str:
    return f"fxprune.{kind.__name__}" if kind.__name__ in fxprune.__all__ else f"{kind.__module__}.{kind.__name__}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OPTIONS.write_text(options_page(), encoding="utf-8")
    PASSES.write_text(passes_page(), encoding="utf-8")
