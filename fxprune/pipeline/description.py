"""What a pass says of itself: its arguments with their defaults and doc lines, the facts it takes and gives."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass
from typing import Any

import networkx as nx

from fxprune.errors import PassError
from fxprune.graph.facts import Fact
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.registry import pass_class
from fxprune.pipeline.spelling import default_of, spelled_fields, spelled_value

__all__ = ["Argument", "arguments_of", "example_of", "in_order", "plain"]

_ENTRY = re.compile(r"^    (\w+): (.+?)(?=^    \w+: |^\S|\Z)", re.M | re.S)
"""A name in a section of arguments, and what is said of it, over several lines."""


@dataclass(frozen=True)
class Argument:
    """An argument of a pass.

    Args:
        name: how it is spelled.
        default: its default as text; empty where it has none that can be written.
        doc: what the pass says of it.
    """

    name: str
    default: str
    doc: str


def arguments_of(made: type[Pass]) -> tuple[Argument, ...]:
    """Return the arguments of a class of passes, in their order."""
    docs = _doc_lines(made)
    return tuple(Argument(field.name, _default(field), docs.get(field.name, "")) for field in spelled_fields(made))


def example_of(made: type[Pass]) -> str:
    """Return a pass in the text of a pipeline, with the defaults of those arguments that have a spelling."""
    empty = ("", "''", "None", "[]")
    given = ", ".join(f"{one.name}={one.default}" for one in arguments_of(made) if one.default not in empty)
    return f"{made.name}{{{given}}}" if given else made.name


def plain(text: str) -> str:
    """Return a docstring as it is read in a terminal: one backtick for two, and none of Sphinx's roles."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of passes by stage; in a stage, those that give a fact before those that need it.

    Passes that cannot be imported come last.
    """
    found: dict[str, type[Pass]] = {}
    broken = []
    for name in sorted(names):
        try:
            found[name] = pass_class(name)
        except PassError:
            broken.append(name)
    ordered: list[str] = []
    for stage in STAGES:
        here = [name for name, made in found.items() if made.stage == stage]
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(here)
        graph.add_edges_from((a, b) for a in here for b in here if _before(found[a], found[b]))
        ordered += nx.lexicographical_topological_sort(graph)
    return [*ordered, *(name for name in found if name not in ordered), *broken]


def _before(giver: type[Pass], taker: type[Pass]) -> bool:
    """Whether one pass gives what another needs, and not the other way round as well."""
    return bool(_kinds(giver, "gives") & _kinds(taker, "needs")) and not _kinds(taker, "gives") & _kinds(giver, "needs")


def _kinds(made: type[Pass], word: str) -> set[type[Fact]]:
    """Return classes of facts that a class of passes declares; what it finds out from its arguments is none."""
    declared = getattr(made, word)
    return {*declared} if isinstance(declared, tuple) else set()


def _default(field: Field[Any]) -> str:
    if not field.metadata.get("spelled", True):
        return ""
    return spelled_value(default_of(field)) or ""


def _doc_lines(made: type[Pass]) -> Mapping[str, str]:
    """Return what a class and those above it say of their arguments, by name; the nearest counts."""
    found: dict[str, str] = {}
    for above in made.__mro__:
        section = inspect.cleandoc(above.__doc__ or "").partition("\nArgs:\n")[2]
        for name, doc in _ENTRY.findall(section):
            found.setdefault(name, plain(" ".join(doc.split())))
    return found
