"""Rows of training data, read from files, hub data sets or memory; those that cannot be read are named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxprune.data.text import offline_text
from fxprune.errors import DataError
from fxprune.pipeline.arguments import told

__all__ = ["BadRow", "read_rows"]

_SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")

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


def read_rows(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, or a :class:`BadRow` in its stead.

    Args:
        data: none for the standard library's own text; a path ending in .json, .jsonl, .txt or .parquet; the id of a
            hub data set, ``"owner/name"`` or ``"owner/name:config"``, of which the split ``train`` is taken; or rows
            in memory: a ``datasets.Dataset`` or any iterable of dicts or strings.

    Raises:
        DataError: the source is not there or is not of its kind.
    """
    if data is None:
        return iter([("the built-in text", offline_text())])
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith(_SUFFIXES)):
        return _from_file(Path(data))
    if isinstance(data, str):
        return _numbered(_from_hub(data))
    if isinstance(data, Mapping | bytes | type | torch.Tensor) or not isinstance(data, Iterable):
        raise DataError(
            f"cannot read {told(data)}",
            where="data",
            remedy="Pass a path, the id of a data set, a datasets.Dataset, or a list of rows",
        )
    return _numbered(data)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in _SUFFIXES:
        raise DataError(f"a {path.suffix or 'suffixless'} file", where=str(path), remedy=f"Give one of {_SUFFIXES}")
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), remedy=f"Give the path of one of {_SUFFIXES}")
    if path.suffix == ".parquet":
        return _numbered(_load("parquet", str(path), data_files=str(path)))
    try:
        content = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"not UTF-8 text: {error}", where=str(path), remedy="Give a text file in UTF-8") from error
    if path.suffix == ".txt":
        return iter([(path.name, content)])
    return _lines(content) if path.suffix == ".jsonl" else _document(content, path)


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
    return _numbered(loaded if isinstance(loaded, list) else [loaded])


def _lines(content: str) -> Iterator[tuple[str, Any]]:
    """Yield one row a line, so that a broken one is named and the others are read."""
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadRow(where, f"not JSON: {getattr(error, 'msg', error)}")


def _from_hub(name: str) -> Iterable[Any]:
    path, _, config = name.partition(":")
    return _load(path, name, *([config] if config else []))


def _load(path: str, where: str, *args: Any, **options: Any) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "the package `datasets` is not installed",
            where=where,
            remedy="pip install 'fxprune[recover]', or give a .json, .jsonl or .txt file",
        ) from error
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, *args, split="train", **options)
    except Exception as error:  # the network, the hub and the loader of the data set raise what they like
        raise DataError(
            f"cannot be loaded: {type(error).__name__}: {str(error)[:_LONGEST]}",
            where=where,
            remedy=f"Give a path ending in one of {_SUFFIXES}, or the id of a data set that can be reached",
        ) from error
    return rows
