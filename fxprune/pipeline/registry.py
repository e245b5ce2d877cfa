"""Passes by name, through the entry points of the group ``fxprune.passes``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import networkx as nx

from fxprune.errors import PassError, UnknownNameError
from fxprune.graph.facts import Fact, tell_givers
from fxprune.pipeline.arguments import one_of
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.spelling import default_of, read_spelling, spelled_fields, spelled_value

__all__ = [
    "Argument",
    "arguments_of",
    "example_of",
    "in_order",
    "load_pass",
    "parse_pass",
    "pass_class",
    "pass_names",
    "plain",
]

_GROUP = "fxprune.passes"


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def pass_names(stage: str | None = None) -> tuple[str, ...]:
    """Names of all installed passes, or of those of one stage that can be imported, such as ``"importance"``.

    Raises:
        UnknownNameError: no such stage.
    """
    if stage is not None:
        one_of("stage", stage, STAGES)
    names = tuple(sorted(_entries()))
    return names if stage is None else tuple(name for name in names if _stage(name) == stage)


def pass_class(name: str) -> type[Pass]:
    """The class of passes registered as ``name``.

    Raises:
        UnknownNameError: no such pass.
        PassError: its package cannot be imported, or what it registers is no pass.
    """
    entry = _entries()[one_of("pass", name, _entries())]
    try:
        found = entry.load()
    except Exception as error:  # importing a stranger's package may raise anything
        raise PassError(
            f"cannot be imported from {entry.value}: {type(error).__name__}: {error}",
            where=f"pass {name}",
            remedy="Mend or uninstall the package that registers it; the other passes work without it",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(f"{entry.value} is no class of passes", where=f"pass {name}", remedy="Subclass fxprune.Pass")
    return found


def load_pass(name: str, **arguments: Any) -> Pass:
    """The pass registered as ``name``, made with ``arguments``.

    Raises:
        UnknownNameError: no such pass, or it does not take one of the arguments.
        PassError: its package cannot be imported.
    """
    made = pass_class(name)
    known = [field.name for field in spelled_fields(made)]
    for argument in arguments:
        if argument not in known:
            raise UnknownNameError(f"argument of pass {name}", argument, known)
    return made(**arguments)


def parse_pass(text: str, **defaults: Any) -> Pass:
    """The pass spelled ``name`` or ``name{key=value, key=value}``.

    Args:
        text: the spelling; see :func:`fxprune.pipeline.spelling.read_spelling`.
        defaults: arguments where the text does not say otherwise; those the pass does not take are left out.

    Raises:
        PassError: the text is not of that form, or the pass cannot be imported.
        UnknownNameError: no such pass or argument.
    """
    name, arguments = read_spelling(text)
    known = {field.name for field in spelled_fields(pass_class(name))}
    return load_pass(name, **{key: value for key, value in defaults.items() if key in known} | arguments)


def _stage(name: str) -> str:
    try:
        return pass_class(name).stage
    except PassError:  # a broken plug-in is told to those who ask for it by name
        return ""


def _givers(kind: type[Fact]) -> tuple[str, ...]:
    """Names of the passes that give a fact."""
    found = []
    for name in pass_names():
        try:
            gives: object = pass_class(name).gives
        except PassError:  # a broken plug-in gives nothing
            continue
        if isinstance(gives, tuple) and kind in gives:  # what a sequence gives, its steps do
            found.append(name)
    return tuple(found)


tell_givers(_givers)


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
