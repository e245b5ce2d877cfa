"""Passes as text: ``select-by-ratio{ratio=0.3, kinds=[mlp, head]}``, several parted by commas or line breaks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import Any

from torch.fx.passes.infra.pass_base import PassBase

from fxprune.errors import PassError
from fxprune.pipeline.arguments import declared, default_of

__all__ = ["read_spelling", "read_steps", "spell", "spelled_fields", "spelled_value", "split"]

_FORM = "Write it as name{key=value, key=value}"
_BARE = re.compile(r"[A-Za-z_][\w.\-]*")
_DEEPEST = 20
"""Brackets in brackets: a list in the arguments of a pass in a pipeline takes four."""
_SHOWN = 60
"""Characters of a long text that a message repeats."""
_CLOSING = {"{": "}", "[": "]", "(": ")"}


def split(text: str, parting: str) -> Iterator[str]:
    """Yield the parts of ``text`` between characters of ``parting`` outside brackets and quotes, which must close."""
    expected: list[str] = []
    quote, part = "", ""
    for before, sign in zip(f" {text}", text, strict=False):
        if quote:
            quote = "" if sign == quote and before != "\\" else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _CLOSING:
            expected.append(_CLOSING[sign])
            if len(expected) > _DEEPEST:
                raise PassError("brackets are nested too deep", where=f"{text[:_SHOWN]}...", remedy=_FORM)
        elif expected and sign == expected[-1]:
            expected.pop()
        elif sign in parting and not expected:
            yield part.strip()
            part = ""
            continue
        part += sign
    if quote or expected:
        missing = {"}": "no closing brace"}.get(expected[-1] if expected else "", "a bracket or quote is not closed")
        raise PassError(missing, where=text, remedy=_FORM)
    yield part.strip()


def read_spelling(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a pass spelled ``name`` or ``name{key=value, key=value}``.

    Values are numbers, strings in quotes, bare words, ``True``, ``False``, ``None``, passes with their arguments, and
    lists or tuples of these. A key alone is True. Arguments are separated by commas, blanks, or both.

    Raises:
        PassError: the text is not of that form.
    """
    for _ in split(text, ""):
        pass  # it is checked on the way that all brackets are closed
    name, brace, rest = text.strip().partition("{")
    if brace and not rest.endswith("}"):
        raise PassError("something stands behind the closing brace", where=text, remedy=_FORM)
    arguments: dict[str, Any] = {}
    for item in split(rest[:-1], ", \t\n") if brace else ():
        key, equals, value = item.partition("=")
        if item and not (_BARE.fullmatch(item) or (equals and key and value)):
            raise PassError(f"{item!r} is not key=value", where=text, remedy=_FORM)
        if item:
            arguments[key.replace("-", "_")] = _value(value) if equals else True
    return name.strip(), arguments


def read_steps(text: str) -> list[str]:
    """The steps of a pipeline in text, as they are spelled: a pass each, or a pipeline in brackets."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [part for part in split(lines, ",\n;") if part]


def _value(text: str) -> Any:
    if (_BARE.fullmatch(text) and text not in ("True", "False", "None")) or _is_pass(text):
        return text
    if text[0] in "[(":
        return tuple(_value(item) for item in split(text[1:-1], ",") if item)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        remedy = "Put text that is not one word in quotes"
        raise PassError(f"{text!r} is no value", where=text, remedy=remedy) from error


def _is_pass(text: str) -> bool:
    return text.endswith("}") and _BARE.fullmatch(text.partition("{")[0]) is not None


def spelled_fields(made: object) -> tuple[Field[Any], ...]:
    """The fields of a pass, or of a class of passes, that are arguments."""
    return tuple(field for field in fields(made) if field.init)  # type: ignore[arg-type]


def spell(name: str, made: object) -> str:
    """The text for a pass: its name, and the arguments that are not the default and have a spelling."""
    said: Mapping[str, Any] = {
        field.name: getattr(made, field.name)
        for field in spelled_fields(made)
        if declared(field).spelled and _has_spelling(getattr(made, field.name), default_of(field))
    }
    arguments = ", ".join(key if value is True else f"{key}={_text(value)}" for key, value in said.items())
    return f"{name}{{{arguments}}}" if arguments else name


def _has_spelling(value: Any, default: Any) -> bool:
    if isinstance(value, tuple | list):
        return value != default and all(_has_spelling(item, ...) for item in value)
    return (value is None or isinstance(value, str | int | float | PassBase)) and value != default


def spelled_value(value: Any) -> str | None:
    """The text for the value of an argument; None if it is not plain data."""
    return _text(value) if _has_spelling(value, ...) else None


def _text(value: Any) -> str:
    if isinstance(value, PassBase):
        return str(value)
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and value not in ("True", "False", "None")
        return value if bare or _is_pass(value) else repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return repr(value)
