"""Passes by name, through the entry points of the group ``fxprune.passes``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxprune.errors import PassError, UnknownNameError
from fxprune.graph.facts import Fact, tell_givers
from fxprune.pipeline.arguments import one_of
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.spelling import read_spelling, spelled_fields

__all__ = ["load_pass", "parse_pass", "pass_class", "pass_names"]

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
