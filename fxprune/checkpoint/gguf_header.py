"""Headers of GGUF files: their entries, and whether the tensors fit them and the file."""

from __future__ import annotations

import math
import os
import re
import struct
from itertools import pairwise
from typing import Any, BinaryIO

import gguf

from fxprune.errors import CheckpointError

__all__ = ["check_gguf", "read_header"]

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values in the format, as formats of ``struct``."""

_TEXT, _ARRAY = 8, 9
_MOST_AXES = 4

_Spans = dict[str, tuple[int, int]]
"""Where the bytes of each tensor begin and end, from the start of the file."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the entries of a GGUF file up to those of its tokenizer; empty for an unknown version.

    Raises:
        ValueError: the file is truncated, or not a GGUF file.
    """
    return _read(path, whole=False)[0]


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose tensors overlap or are cut off, or that holds more blocks than its entries say.

    transformers reads such a file to other numbers, or without end.

    Raises:
        CheckpointError: it is such a file.
    """
    fault = ""
    try:
        entries, spans = _read(path, whole=True)
        layers = entries.get(f"{entries.get('general.architecture')}.block_count", 0)
        blocks = [int(found[1]) for name in spans if (found := re.match(r"blk\.(\d+)\.", name))]
        if max((end for _, end in spans.values()), default=0) > os.stat(path).st_size:
            fault = "its tensors are cut off"
        elif any(end > start for (_, end), (start, _) in pairwise(sorted(spans.values()))):
            fault = "its tensors overlap"
        elif max(blocks, default=-1) >= layers:
            fault = f"it holds {max(blocks) + 1:,} blocks and says {layers:,}"
    except (OSError, ValueError, TypeError) as error:
        fault = str(error)
    if fault:
        where = os.fspath(path)
        raise CheckpointError(f"cannot be loaded: {fault}", where=where, remedy="Download or export it again")


def _read(path: str | os.PathLike[str], *, whole: bool) -> tuple[dict[str, Any], _Spans]:
    found: dict[str, Any] = {}
    spans: _Spans = {}
    with open(path, "rb") as file:
        try:
            if _bytes(file, 4) != b"GGUF":
                raise ValueError("it does not begin as a GGUF file does")
            if _number(file, "I") not in (2, 3):  # versions with the same header
                return {}, {}
            count = _number(file, "Q")
            for _ in range(_number(file, "Q")):
                name = _value(file, _TEXT)
                if not whole and name.startswith("tokenizer."):  # such entries are long, and not needed
                    return found, {}
                found[name] = _value(file, _number(file, "I"))
            for _ in range(count if whole else 0):
                name = _value(file, _TEXT)
                axes = [_number(file, "Q") for _ in range(min(_number(file, "I"), _MOST_AXES + 1))]
                values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(_number(file, "I"))]
                begin = _number(file, "Q")
                spans[name] = begin, begin + math.prod(axes) // values * size
            start = -(-file.tell() // (step := found.get("general.alignment", 32))) * step
        except (EOFError, KeyError, ArithmeticError, UnicodeDecodeError, MemoryError, RecursionError) as error:
            raise ValueError("it ends too early, or is damaged") from error
    return found, {name: (start + begin, start + end) for name, (begin, end) in spans.items()}


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
