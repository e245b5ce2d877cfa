"""Rows of text, instructions and chats, from files, data sets and lists; bad rows are named, not raised."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fxprune.data.named import ROW_SUFFIXES, load_named, load_split
from fxprune.errors import DataError
from fxprune.pipeline.arguments import format_value

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

_REQUIRED = {
    "instruction": ("instruction", "output"),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that a row of each kind must have, in the order in which the kinds are tried."""

_ROLES = {"human": "user", **{role: role for role in ("user", "system", "tool", "function")}}
"""Roles of messages that say who they are ``from``; any other name is that of a model, which is the assistant."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its place, such as ``"line 7"`` or ``"row 12"``, and what is wrong with it."""

    where: str
    why: str


@dataclass(frozen=True)
class Row:
    """A row of a known kind.

    Args:
        kind: ``instruction`` (fields ``instruction``, ``input``, ``output``), ``chat`` (``messages``), ``completion``
            (``prompt``, ``completion``) or ``text``.
        fields: its fields as they were read; those that the kind requires are not None.
    """

    where: str
    kind: str
    fields: Mapping[str, Any]

    def texts(self) -> dict[str, str] | BadRow:
        """The text fields of a row that is no chat, an input that was left out as ""; a bad row if one is not text."""
        found = {name: self.fields[name] for name in _REQUIRED[self.kind]}
        if self.kind == "instruction":
            found["input"] = self.fields.get("input") or ""
        for name, value in found.items():
            if not isinstance(value, str):
                return BadRow(self.where, f"{name!r} is not text, but {type(value).__name__}")
        return found

    def prompt(self, texts: Mapping[str, str]) -> str:
        """The prompt of a row with the fields ``texts``; a blank input is no part of that of an instruction."""
        if self.kind != "instruction":
            return texts.get("prompt", "")
        return (TEMPLATE_WITH_INPUT if texts["input"].strip() else TEMPLATE).format(**texts)

    def response(self, texts: Mapping[str, str]) -> str:
        """What follows the prompt of a row with the fields ``texts``: output, completion, or the whole text."""
        return texts[_REQUIRED[self.kind][-1]]

    def text(self) -> str | BadRow:
        """The whole row as text: a prompt with its response, messages separated by blank lines, or the text itself."""
        if self.kind != "chat":
            texts = self.texts()
            return texts if isinstance(texts, BadRow) else self.prompt(texts) + self.response(texts)
        messages = self.fields["messages"]
        if not isinstance(messages, Iterable) or isinstance(messages, str) or not messages:
            return BadRow(self.where, "'messages' is not a list of messages")
        contents = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
        if not all(isinstance(content, str) for content in contents):
            return BadRow(self.where, "'messages' has a message whose 'content' is not text")
        return "\n\n".join(map(str, contents))


def read_rows(data: Any, kind: str = "auto") -> Iterator[Row | BadRow]:
    """Read the rows of a file, a data set or a list.

    A file is opened by the call, so that one that cannot be read is reported before the first row is asked for.

    Args:
        data: a path ending in .json, .jsonl, .txt or .parquet; the name of a data set, ``"wikitext2"``, ``"c4"``,
            ``"ptb"``, ``"owner/name"`` or ``"owner/name:config"``, of which the split ``train`` is taken; or rows in
            memory: a ``datasets.Dataset`` or any iterable of dicts, strings or chats.
        kind: the only kind to accept, such as ``chat``; ``auto`` to tell it by the fields.
    """
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith(ROW_SUFFIXES)):
        rows = _open(Path(data))
    elif isinstance(data, str):
        rows = _numbered(load_named(data))
    elif isinstance(data, Mapping | bytes | type | torch.Tensor) or not isinstance(data, Iterable):
        what = f"cannot read {format_value(data)}"
        remedy = "Pass a path, the name of a data set, a datasets.Dataset, or a list of rows"
        if hasattr(data, "column_names") and isinstance(data, Mapping):
            remedy = f"Pass one of its splits: {', '.join(map(str, data))}"
        raise DataError(what, where="data", remedy=remedy)
    else:
        rows = _numbered(data)
    return (parse_row(where, value, kind) for where, value in rows)


def parse_row(where: str, value: Any, kind: str = "auto") -> Row | BadRow:
    """A row from a value, with ``kind`` as for :func:`read_rows`; a bad row if it is of no such kind."""
    if isinstance(value, BadRow):
        return value
    value = _with_messages(value)
    if isinstance(value, str):
        if kind not in ("auto", "text"):
            return BadRow(where, f"plain text, not {kind}")
        return Row(where, "text", {"text": value})
    if not isinstance(value, Mapping):
        return BadRow(where, f"not an object, but {type(value).__name__}")
    for name, required in _REQUIRED.items():
        if kind in ("auto", name) and all(value.get(field) is not None for field in required):
            return Row(where, name, value)
    missing = [field for field in _REQUIRED.get(kind, ()) if value.get(field) is None]
    why = f"no {missing[0]!r}" if missing else "none of the known fields"
    return BadRow(where, f"{why}; its fields are {sorted(map(str, value))}")


def is_chat(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _with_messages(value: Any) -> Any:
    """A chat in another common form as a row with ``messages``; any other row as it is.

    The form may be a bare list of messages; ``conversations``, whose messages may have ``from`` and ``value``; or
    ``prompt`` and ``completion`` that are both lists of messages, as TRL reads them.
    """
    if is_chat(value):
        return {"messages": value}
    if not isinstance(value, Mapping) or value.get("messages") is not None:
        return value
    chat, prompt, completion = (value.get(name) for name in ("conversations", "prompt", "completion"))
    if is_chat(prompt) and is_chat(completion):
        return {**value, "messages": [*prompt, *completion]}
    return {**value, "messages": [_message(one) for one in chat]} if is_chat(chat) else value


def _message(one: Mapping[str, Any]) -> Mapping[str, Any]:
    if "from" not in one or "value" not in one:
        return one
    return {"role": _ROLES.get(one["from"], "assistant"), "content": one["value"]}


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _open(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in ROW_SUFFIXES or path.is_dir():
        what = "it is a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise DataError(what, where=str(path), remedy=f"Give one of {ROW_SUFFIXES}")
    if not os.path.isfile(path):
        raise DataError("there is no such file", where=str(path), remedy=f"Give the path of one of {ROW_SUFFIXES}")
    if path.suffix == ".parquet":
        return _numbered(load_split("parquet", data_files=str(path), split="train"))
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"not UTF-8 text: {error}", where=str(path), remedy="Give a text file in UTF-8") from error
    if path.suffix == ".txt":
        return iter([(path.name, content)])
    if path.suffix == ".jsonl":
        return _parsed_lines(content)
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # JSON lines under the name of a document
            return _parsed_lines(content)
        remedy = "Mend the file, or write one object on each line"
        raise DataError(f"not JSON: {error}", where=str(path), remedy=remedy) from None
    if isinstance(loaded, Mapping) and len(loaded) == 1 and isinstance(rows := next(iter(loaded.values())), list):
        loaded = rows  # {"data": [row, row, ...]}
    return _numbered(loaded if isinstance(loaded, list) else [loaded])


def _parsed_lines(content: str) -> Iterator[tuple[str, Any]]:
    for number, line in json_lines(content):
        where = f"line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadRow(where, f"not JSON: {getattr(error, 'msg', error)}")


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """Number the lines of JSON lines from 1, without blank ones.

    Only a line feed ends a line: other line breaks of Unicode, such as U+2028, may stand inside a JSON string.
    """
    return ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())
