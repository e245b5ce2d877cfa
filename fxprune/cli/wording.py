"""Messages of the package in the words of the command line: ``--group-ratio 0.3`` for ``group_ratio=0.3``."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from typing import Any

__all__ = ["in_options", "option"]

_OTHERWISE = {"inplace": "in_place"}
"""Arguments whose option has another name."""

_VALUE = r"""\([^()]*\)|\[[^][]*\]|'[^']*'|"[^"]*"|[\w.+-]*\w"""
_GIVEN = re.compile(rf"(?<![\w{{-])(?P<name>[a-z_]+)=(?P<value>{_VALUE})?(?![^{{]*}})")
"""An argument with its value, outside of the braces of a pass."""


def option(name: str) -> str:
    """Return the option of an argument: ``--group-ratio`` of ``group_ratio``."""
    return f"--{_OTHERWISE.get(name, name).replace('_', '-')}"


def in_options(text: str, where: str, names: Collection[str]) -> str:
    """Return a message with options in place of arguments.

    Args:
        text: the message.
        where: what it is about; an argument, perhaps.
        names: the arguments that are options.
    """
    known = {*names, *_OTHERWISE}
    text = _GIVEN.sub(lambda match: _spelled(match, known), text)
    if where in known and text.startswith((f"{where} ", f"{where}: ")):
        text = option(where) + text[len(where) :]
    compound = [name for name in known if "_" in name]
    return re.sub(rf"\b({'|'.join(compound)})\b", lambda match: option(match[1]), text) if compound else text


def _spelled(match: re.Match[str], known: Collection[str]) -> str:
    name, value = match["name"], match["value"]
    if name not in known:
        return match[0]
    return option(name) if value is None else _with_value(option(name), value)


def _with_value(spelled: str, text: str) -> str:
    try:
        value: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return f"{spelled} {text}"
    if value is True:
        return spelled
    if value is None or value is False or value == ():
        return f"no {spelled}"
    if isinstance(value, tuple | list):
        return f"{spelled} {(',' if isinstance(value[0], str) else ' ').join(map(str, value))}"
    return f"{spelled} {value}"
