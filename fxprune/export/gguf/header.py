"""What a GGUF file says of itself, without its tokenizer and tensors. It needs no torch, and takes milliseconds."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

__all__ = ["layers_differ", "read_header"]

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values in the format, as `struct` spells them."""

_TEXT, _ARRAY = 8, 9

_VERSIONS = (2, 3)
"""Of the format, that begin alike."""

_LAST = "tokenizer."
"""How the names of the first entries begin that are of no interest here, and long."""

_WIDTHS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""Entries that are one number for all blocks, or a list with one for each."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the entries of a GGUF file up to those of its tokenizer; none of a version that is not known.

    Raises:
        ValueError: the file ends before they do, or is no GGUF file.
    """
    found: dict[str, Any] = {}
    with open(path, "rb") as file:
        try:
            if _bytes(file, 4) != b"GGUF":
                raise ValueError("it does not begin as a GGUF file does")
            if _number(file, "I") not in _VERSIONS:
                return {}
            _number(file, "Q")
            for _ in range(_number(file, "Q")):
                name = _value(file, _TEXT)
                if name.startswith(_LAST):
                    break
                found[name] = _value(file, _number(file, "I"))
        except (EOFError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError("it ends too early, or is damaged") from error
    return found


def layers_differ(header: dict[str, Any]) -> bool:
    """Return whether the blocks of a file differ in width or in numbers of heads."""
    prefix = f"{header.get('general.architecture')}."
    widths = (header.get(prefix + name) for name in _WIDTHS)
    return any(len(set(numbers)) > 1 for numbers in widths if isinstance(numbers, list))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _bytes(file, _number(file, "Q")).decode("utf-8")
    if kind == _ARRAY:
        inner = _number(file, "I")
        return [_value(file, inner) for _ in range(_number(file, "Q"))]
    return _number(file, _NUMBERS[kind])


def _number(file: BinaryIO, spelled: str) -> Any:
    form = "<" + spelled
    return struct.unpack(form, _bytes(file, struct.calcsize(form)))[0]


def _bytes(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise EOFError
    return found
