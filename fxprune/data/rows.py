"""Rows of data in files: texts, instructions and chats; those that cannot be read are named. It needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune.errors import DataError
from fxprune.graph.silence import quiet

__all__ = [
    "SUFFIXES",
    "TEMPLATE",
    "TEMPLATE_WITH_INPUT",
    "BadRow",
    "json_lines",
    "kind_of",
    "load_rows",
    "numbered",
    "prompt_of",
    "rows_in_file",
    "text_of",
]

SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
"""How names of files end that rows are read from."""

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
TEMPLATE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Prompts, without and with an input. Source: Taori et al., Stanford Alpaca (2023)."""

_FIELDS = {"instruction": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
"""The fields that a row of each format must have."""

_LONGEST = 300
"""Characters of another package's message that are repeated; some go on for pages."""


@dataclass(frozen=True)
class BadRow:
    """A row that was left out.

    Args:
        where: which one: ``"line 7"``, ``"row 12"``.
        why: what is wrong with it.
    """

    where: str
    why: str


def kind_of(row: Any, wanted: str) -> tuple[str, str]:
    """Return the format of a row and no reason, or no format and the reason why.

    Args:
        row: as it was read.
        wanted: one of ``instruction``, ``chat``, ``text``; or ``auto``, by the fields that the row has.
    """
    if isinstance(row, str):
        return ("text", "") if wanted in ("auto", "text") else ("", f"plain text, not {wanted}")
    if not isinstance(row, Mapping):
        return "", f"a {type(row).__name__}, not an object"
    for kind, needed in _FIELDS.items():
        if wanted in ("auto", kind):
            missing = [name for name in needed if row.get(name) is None]
            if not missing:
                return kind, ""
            if wanted == kind:
                return "", f"no {missing[0]!r}; its fields are {sorted(map(str, row))}"
    return "", f"none of the known fields; its fields are {sorted(map(str, row))}"


def prompt_of(fields: Mapping[str, str]) -> str:
    """Return the prompt of an instruction, with its input where it has one."""
    return (TEMPLATE_WITH_INPUT if fields.get("input", "").strip() else TEMPLATE).format(**fields)


def text_of(row: Any, kind: str) -> str:
    """Return the text of a row: of an instruction with its prompt, of a chat the messages, parted by blank lines.

    Raises:
        DataError: a field is no text.
    """
    if kind == "text":
        text = row if isinstance(row, str) else row["text"]
    elif kind == "instruction":
        fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
        text = prompt_of(fields) + fields["output"] if all(isinstance(v, str) for v in fields.values()) else None
    else:
        turns = [turn.get("content") if isinstance(turn, Mapping) else None for turn in row["messages"]]
        text = "\n\n".join(map(str, turns)) if turns and all(isinstance(turn, str) for turn in turns) else None
    if not isinstance(text, str):
        raise DataError("a field that should be text is not", where="data", remedy=f"Its fields are {sorted(row)}")
    return text


def rows_in_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file with its place, or a :class:`BadRow` in its stead.

    Args:
        path: ends in .json, .jsonl, .txt or .parquet.

    Raises:
        DataError: it is not there or is not of its kind.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"a {path.suffix or 'suffixless'} file", where=str(path), remedy=f"Give one of {SUFFIXES}")
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), remedy=f"Give the path of one of {SUFFIXES}")
    if path.suffix == ".parquet":
        return numbered(load_rows("parquet", str(path), data_files=str(path)))
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors mark the beginning
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"not UTF-8 text: {error}", where=str(path), remedy="Give a text file in UTF-8") from error
    if path.suffix == ".txt":
        return iter([(path.name, content)])
    return _lines(content) if path.suffix == ".jsonl" else _document(content, path)


def numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield rows with their numbers, from 1."""
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def load_rows(path: str, where: str, *args: Any, **options: Any) -> Iterable[Any]:
    """Return the split ``train`` of a data set that the package ``datasets`` reads.

    Args:
        path: its name on a hub, or the name of a format.
        where: for messages.
        args: passed on to ``datasets.load_dataset``.
        options: passed on as well.

    Raises:
        DataError: the package is missing, or it cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "the package `datasets` is not installed",
            where=where,
            remedy="pip install 'fxprune[recover]', or give a .json, .jsonl or .txt file",
        ) from error
    try:
        with quiet():  # it logs what it raises
            rows: Iterable[Any] = datasets.load_dataset(path, *args, split="train", **options)
    except Exception as error:  # the network, the hub and the loader of the data set raise what they like
        raise DataError(
            f"cannot be loaded: {type(error).__name__}: {str(error)[:_LONGEST]}",
            where=where,
            remedy=f"Give a path ending in one of {SUFFIXES}, or the id of a data set that can be reached",
        ) from error
    return rows


def _document(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Return the rows of a JSON document: a list, a list under one key, or objects on lines of their own."""
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return _lines(content)
        raise DataError(
            f"not JSON: {error}", where=str(path), remedy="Mend the file, or give one object a line"
        ) from None
    if isinstance(loaded, Mapping):
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(loaded) == 1 and lists else [loaded]
    return numbered(loaded if isinstance(loaded, list) else [loaded])


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file of JSON lines that are not blank, each with its number, from 1.

    A line feed alone ends one: what else ends lines of text, such as U+2028, may stand in a string of JSON.
    """
    return ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())


def _lines(content: str) -> Iterator[tuple[str, Any]]:
    """Yield one row a line, so that a broken one is named and the others are read."""
    for number, line in json_lines(content):
        where = f"line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadRow(where, f"not JSON: {getattr(error, 'msg', error)}")
