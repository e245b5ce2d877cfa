"""Read and write values inside the arguments of a graph node, by their path.

A path is ``("args", 1, 0)`` or ``("kwargs", "size", 0)``: which arguments, which of them, and where in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

__all__ = ["comparable", "read_argument", "set_argument", "with_argument"]

_ROOTS = {"args": 0, "kwargs": 1}

_PLAIN = frozenset((bool, int, float, str, type(None)))


def read_argument(node: fx.Node, path: tuple[Any, ...]) -> Any:
    """Return the value at ``path`` of ``node``; None where the argument was left to its default."""
    value: Any = (node.args, node.kwargs)[_ROOTS[path[0]]]
    for key in path[1:]:
        if isinstance(value, dict) and key not in value:
            return None
        value = value[key]
    return value


def with_argument(arguments: Any, path: tuple[Any, ...], value: Any) -> tuple[Any, Any]:
    """Return ``(args, kwargs)`` with ``value`` at ``path``."""
    args, kwargs = arguments
    if path[0] == "args":
        return _replaced(args, path[1:], value), kwargs
    return args, _replaced(kwargs, path[1:], value)


def set_argument(node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` at ``path`` of ``node``."""
    node.args, node.kwargs = with_argument((node.args, node.kwargs), path, value)


def _replaced(container: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    if isinstance(container, dict):
        return {**container, keys[0]: _replaced(container.get(keys[0]), keys[1:], value)}
    items = list(container)
    items[keys[0]] = _replaced(items[keys[0]], keys[1:], value)
    return tuple(items) if isinstance(container, tuple) else items


def comparable(value: Any) -> Any:
    """Return arguments as something that compares: nodes by name, containers by content, the rest by its text."""
    if type(value) in _PLAIN:  # most are: asking for the abstract classes below takes longer than all the rest
        return repr(value)
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, Mapping):
        return tuple((key, comparable(item)) for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return (type(value).__name__, *(comparable(item) for item in value))
    return repr(value)
