"""What passes of the suite take, read from their source, so that a wrong argument is told before torch is imported.

Of a pass it reads the names of its fields, and the checks that ``__post_init__`` holds each of them to. Whatever is not
found so is told by the pass itself, once it is made.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from types import ModuleType
from typing import Any

from fxprune.errors import UnknownNameError
from fxprune.pipeline import arguments as known_checks
from fxprune.pipeline import arguments as words
from fxprune.removal import scores as reductions

__all__ = ["check_spelled", "checks_of", "names_of"]

_SUITE = "fxprune.passes"

_TABLES: dict[str | None, ModuleType] = {module.__name__: module for module in (words, reductions)}
"""Modules with tables of words that need no torch."""

_CHECKS = {name: getattr(known_checks, name) for name in ("one_of", "number", "whole_number", "flag", "as_seed")}


_UNLESS_NONE = re.compile(r"self\.\w+ is not None")


@dataclass(frozen=True)
class Check:
    """One check of one argument.

    Args:
        field: the argument.
        check: a function of :mod:`fxprune.pipeline.arguments`.
        given: what it is given besides the value: the name that it is told by, before; and the rest, after.
        named: what it is given by name.
    """

    field: str
    check: Callable[..., Any]
    given: tuple[Any, ...]
    named: Mapping[str, Any]

    def __call__(self, value: Any) -> None:
        """Refuse a value as the pass does; None is for the pass to judge."""
        if value is not None:
            self.check(self.given[0], value, *self.given[1:], **self.named)


def check_spelled(name: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a pass that it does not take, or whose values it refuses.

    Args:
        name: of the pass.
        given: arguments by name, as read from text.

    Raises:
        FxpruneError: what the pass would raise if it were made with them.
    """
    known = names_of(name)
    for argument in given:
        if known is not None and argument not in known:
            raise UnknownNameError(f"argument of pass {name}", argument, known)
    for check in checks_of(name):
        if check.field in given:
            check(given[check.field])


def names_of(name: str) -> tuple[str, ...] | None:
    """Return the arguments of a pass; None of one that is not of the suite."""
    module, _, found = _entry(name).partition(":")
    if not module.startswith(f"{_SUITE}."):
        return None
    classes = [made for _, made in _classes(module, found)]
    return tuple(dict.fromkeys(field for made in reversed(classes) for field in _fields(made)))


def checks_of(name: str) -> tuple[Check, ...]:
    """Return the checks of single arguments that a pass makes; none of one that is not of the suite."""
    module, _, found = _entry(name).partition(":")
    if not module.startswith(f"{_SUITE}."):
        return ()
    return tuple(
        check
        for tree, made in _classes(module, found)
        for method in made.body
        if isinstance(method, ast.FunctionDef) and method.name == "__post_init__"
        for statement in method.body
        for check in _checks(statement, _words(tree))
    )


def _entry(name: str) -> str:
    """Where a pass is, as ``module:class``; empty where there is none of the name."""
    return next((entry.value for entry in entry_points(group=_SUITE, name=name)), "")


def _classes(module: str, name: str) -> Iterator[tuple[ast.Module, ast.ClassDef]]:
    """Yield a class and those of the suite that it is made from, each with the module it is in."""
    tree, package = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield tree, node
            for base in node.bases:
                yield from _classes(module, base.id) if isinstance(base, ast.Name) else ()
        elif isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            place = f"{package}.{node.module}" if node.level else f"{node.module}"
            yield from _classes(place, name) if place.startswith(f"{_SUITE}.") else ()


@cache
def _parsed(module: str) -> tuple[ast.Module, str]:
    """Return the source of a module of the suite, and the package that it is in."""
    *parents, last = module.removeprefix(f"{_SUITE}.").split(".")
    folder = files(_SUITE).joinpath(*parents)
    is_package = folder.joinpath(last).is_dir()
    file = folder.joinpath(last, "__init__.py") if is_package else folder.joinpath(f"{last}.py")
    return ast.parse(file.read_text(encoding="utf-8")), module if is_package else module.rpartition(".")[0]


def _fields(made: ast.ClassDef) -> Iterator[str]:
    """Yield the names of the fields of a dataclass."""
    for node in made.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            yield ast.unparse(node.target)


def _words(tree: ast.Module) -> dict[str, Any]:
    """Return the tables of words that a module imports from where they need no torch."""
    return {
        alias.name: getattr(_TABLES[node.module], alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module in _TABLES
        for alias in node.names
    }


def _checks(statement: ast.stmt, tables: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the checks in a statement that holds whatever the other arguments are."""
    if isinstance(statement, ast.For):
        names = _value(statement.iter, tables)
        for name in names if isinstance(names, tuple) and isinstance(statement.target, ast.Name) else ():
            inner = {**tables, ast.unparse(statement.target): name}
            yield from (check for each in statement.body for check in _checks(each, inner))
    elif isinstance(statement, ast.If):
        for each in statement.body if _UNLESS_NONE.fullmatch(ast.unparse(statement.test)) else ():
            yield from _checks(each, tables)
    elif isinstance(statement, ast.Expr | ast.Assign):
        calls = (node for node in ast.walk(statement) if isinstance(node, ast.Call))
        yield from (check for call in calls for check in _check(call, tables))


def _check(call: ast.Call, tables: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the check that a call is, where all that it is given can be read."""
    check = _CHECKS.get(ast.unparse(call.func))
    if check is None or len(call.args) < 2 or not all(keyword.arg for keyword in call.keywords):
        return
    field = _field(call.args[1], tables)
    given = tuple(_value(node, tables) for node in (call.args[0], *call.args[2:]))
    named = {f"{keyword.arg}": _value(keyword.value, tables) for keyword in call.keywords}
    if field and ... not in given and ... not in named.values():
        yield Check(field, check, given, named)


def _field(node: ast.expr, tables: Mapping[str, Any]) -> str:
    """Return the field of the pass that is read: ``self.name``, or ``getattr(self, name)``; else nothing."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "self":
        return str(_value(node.args[1], tables))
    return ""


def _value(node: ast.expr, tables: Mapping[str, Any]) -> Any:
    """Return what an expression stands for; an ellipsis where that is not known."""
    if isinstance(node, ast.Name):
        return tables.get(node.id, ...)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...
