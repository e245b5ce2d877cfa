"""Passes by name, through the entry points of the group ``fxprune.passes``."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import networkx as nx

from fxprune.errors import PassError, UnknownNameError
from fxprune.graph.facts import Fact, set_giver_lookup
from fxprune.pipeline.arguments import (
    declared,
    default_of,
    invalid,
    one_of,
    read_spelling,
    refuse,
    spelled_fields,
    spelled_value,
)
from fxprune.pipeline.contract import STAGES, Pass

_GROUP = "fxprune.passes"


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def pass_names(stage: str | None = None) -> tuple[str, ...]:
    """Names of all installed passes, or of those of one stage that can be imported, such as ``"importance"``."""
    if stage is None:
        return tuple(sorted(_entries()))
    one_of("stage", stage, STAGES)
    return tuple(name for name, made in _classes().items() if made.stage == stage)


def pass_class(name: str) -> type[Pass]:
    """The class of passes registered as ``name``; PassError if its package cannot be imported."""
    entry = _entries()[one_of("pass", name, _entries())]
    try:
        found = entry.load()
    except Exception as error:  # importing a stranger's package may raise anything
        what = f"cannot be imported from {entry.value}: {type(error).__name__}: {error}"
        remedy = "Mend or uninstall the package that registers it; the other passes work without it"
        raise PassError(what, where=f"pass {name}", remedy=remedy) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(f"{entry.value} is no class of passes", where=f"pass {name}", remedy="Subclass fxprune.Pass")
    return found


def load_pass(name: str, **arguments: Any) -> Pass:
    """The pass registered as ``name``, made with ``arguments``."""
    made = pass_class(name)
    known = [field.name for field in spelled_fields(made)]
    if unknown := [argument for argument in arguments if argument not in known]:
        raise UnknownNameError(f"argument of pass {name}", unknown[0], known)
    return made(**arguments)


def parse_pass(text: str, **defaults: Any) -> Pass:
    """The pass spelled ``name`` or ``name{key=value}``; see :func:`fxprune.pipeline.arguments.read_spelling`.

    ``defaults`` are arguments that the text leaves open; those the pass does not take are left out.
    """
    name, arguments = read_spelling(text)
    known = {field.name for field in spelled_fields(pass_class(name))}
    return load_pass(name, **{key: value for key, value in defaults.items() if key in known} | arguments)


def pass_argument(stage: str) -> Callable[[str, Any], Pass]:
    """The check of an argument that is a pass of ``stage``, or its spelling as text."""

    def check(name: str, value: Any) -> Pass:
        made = parse_pass(value) if isinstance(value, str) else value
        if not isinstance(made, Pass):
            raise refuse(name, value, f"a pass of the stage {stage!r}, or its spelling as text")
        if made.stage != stage:
            remedy = f"Name a pass of the stage {stage!r}"
            raise invalid(name, value, f"{made.name} is of the stage {made.stage!r}", remedy)
        return made

    return check


def _classes() -> dict[str, type[Pass]]:
    """The classes of the installed passes, by name in order, without those that cannot be imported."""
    found: dict[str, type[Pass]] = {}
    for name in pass_names():
        with suppress(PassError):  # a broken plug-in is told to those who ask for it by name
            found[name] = pass_class(name)
    return found


# names of the passes that give a fact, without sequences of passes
set_giver_lookup(lambda kind: tuple(name for name, made in _classes().items() if kind in _kinds(made, "gives")))


def arguments_of(made: type[Pass]) -> tuple[tuple[str, str, str], ...]:
    """Name, default as text and doc of each argument of a class of passes, in order."""
    return tuple(
        (one.name, (declared(one).spelled and spelled_value(default_of(one))) or "", plain(declared(one).doc))
        for one in spelled_fields(made)
    )


def example_of(made: type[Pass]) -> str:
    """A pass in the text of a pipeline, with the defaults of those arguments that have a spelling."""
    empty = ("", "''", "None", "[]")
    given = ", ".join(f"{name}={default}" for name, default, _ in arguments_of(made) if default not in empty)
    return f"{made.name}{{{given}}}" if given else made.name


def plain(text: str) -> str:
    """A docstring as read in a terminal: one backtick for two, and no roles of Sphinx."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def in_order() -> list[str]:
    """Names of all installed passes by stage; within a stage, those that give a fact before those that need it.

    Passes that cannot be imported come last.
    """
    found = _classes()
    ordered: list[str] = []
    for stage in STAGES:
        here = [name for name, made in found.items() if made.stage == stage]
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(here)
        gives, needs = ({name: _kinds(found[name], word) for name in here} for word in ("gives", "needs"))
        graph.add_edges_from((a, b) for a in here for b in here if gives[a] & needs[b] and not gives[b] & needs[a])
        ordered += nx.lexicographical_topological_sort(graph)
    of_no_stage = (name for name in found if name not in ordered)
    return [*ordered, *of_no_stage, *(name for name in pass_names() if name not in found)]


def _kinds(made: type[Pass], word: str) -> set[type[Fact]]:
    """Classes of facts that a class of passes declares; a property, which depends on arguments, counts as none."""
    declared = getattr(made, word)
    return {*declared} if isinstance(declared, tuple) else set()
