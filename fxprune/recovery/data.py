"""Training and held-out samples: read, formatted, packed, without overlap."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxprune.data.built_in import built_in_text
from fxprune.data.calibration import IGNORED
from fxprune.data.text import SUFFIXES, BadRow, kind_of, load_rows, numbered, paragraphs, prompt_of, rows_in_file
from fxprune.errors import DataError
from fxprune.pipeline.arguments import told
from fxprune.recovery.settings import RecoverySettings

__all__ = ["DataReport", "Example", "Formatter", "TrainingData", "collate", "read_rows", "read_training_data"]

_LONGEST = 80
"""Characters of a chat template's error that are repeated: rows are named by the reason, which has to stay short."""


@dataclass(frozen=True)
class Example:
    """One sample.

    Args:
        ids: token ids.
        labels: the same, :data:`fxprune.data.calibration.IGNORED` where a token does not count in the loss.
        cut: whether it was longer than allowed.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Formatter:
    """Turns rows of instructions and chats into examples.

    Args:
        tokenizer: the model's.
        max_tokens: longest example.
        response_only: whether prompts do not count in the loss.
    """

    tokenizer: Any
    max_tokens: int
    response_only: bool

    def example(self, row: Mapping[str, Any], kind: str, where: str) -> Example | BadRow:
        """Return the example of a row, or what is wrong with it.

        Args:
            row: an instruction or a chat.
            kind: its format.
            where: its place in the data, for messages.
        """
        made = self._instruction(row) if kind == "instruction" else self._chat(row)
        if isinstance(made, str):
            return BadRow(where, made)
        ids, labels = made
        example = Example(ids[: self.max_tokens], labels[: self.max_tokens], len(ids) > self.max_tokens)
        if all(label == IGNORED for label in example.labels[1:]):
            return BadRow(where, f"no response within {self.max_tokens} tokens")
        return example

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; with the tokens that the tokenizer puts around one, where ``special``."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _instruction(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
        for name, value in fields.items():
            if not isinstance(value, str):
                return f"{name!r} is a {type(value).__name__}, not text"
            if not value.strip() and name != "input":
                return f"{name!r} is empty"
        prompt = prompt_of(fields)
        whole = self._closed(self.encode(prompt + fields["output"], special=True))
        start = _shared(whole, self.encode(prompt, special=True)) if self.response_only else 0
        return tuple(whole), tuple([IGNORED] * start + whole[start:])

    def _closed(self, ids: list[int]) -> list[int]:
        """Return the ids with the end-of-text token once at their end."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _chat(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        messages = row["messages"]
        why = _unfit(messages)
        if why:
            return why
        if not getattr(self.tokenizer, "chat_template", None):
            return "a chat, but the tokenizer has no chat template"
        try:
            whole = self._rendered(messages)
            if not self.response_only:
                return tuple(whole), tuple(whole)
            labels = [IGNORED] * len(whole)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = _shared(whole, self._rendered(messages[:turn], prompt=True)) if turn else 0
                    end = _shared(whole, self._rendered(messages[: turn + 1]))
                    labels[start:end] = whole[start:end]
        except Exception as error:  # a template is a program of the tokenizer's makers, and may raise anything
            return f"the chat template refuses it: {type(error).__name__}: {str(error)[:_LONGEST]}"
        return tuple(whole), tuple(labels)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return self.encode(text)


def _unfit(messages: Any) -> str:
    """Return what is wrong with the messages of a chat; empty where nothing is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "'messages' is not a list of messages"
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return "a message without 'role' and 'content' as text"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no message of the assistant"
    return ""


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with: a prompt's last one may merge with what follows it."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


def read_rows(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, or a :class:`fxprune.data.text.BadRow` in its stead.

    Args:
        data: none for the built-in text; a path ending in .json, .jsonl, .txt or .parquet; the id of a
            hub data set, ``"owner/name"`` or ``"owner/name:config"``, of which the split ``train`` is taken; or rows
            in memory: a ``datasets.Dataset`` or any iterable of dicts or strings.

    Raises:
        DataError: the source is not there or is not of its kind.
    """
    if data is None:
        return iter([("the built-in text", built_in_text())])
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith(SUFFIXES)):
        return rows_in_file(Path(data))
    if isinstance(data, str):
        return numbered(_from_hub(data))
    if isinstance(data, Mapping | bytes | type | torch.Tensor) or not isinstance(data, Iterable):
        raise DataError(
            f"cannot read {told(data)}",
            where="data",
            remedy="Pass a path, the id of a data set, a datasets.Dataset, or a list of rows",
        )
    return numbered(data)


def _from_hub(name: str) -> Iterable[Any]:
    path, _, config = name.partition(":")
    return load_rows(path, name, *([config] if config else []))


_NAMED = 5
"""Reasons, and rows of each, that a message names: it fits a few lines, and shows what kind of row is bad."""

_PASSAGE = 2000
"""Characters of the runs of paragraphs that a text is split by: about two samples of the default length."""


@dataclass(frozen=True)
class DataReport:
    """What became of the rows that were read.

    Args:
        rows: how many were read.
        train: samples trained on; windows, of plain text.
        held_out: samples kept for the held-out loss.
        bad: rows left out, each with the reason.
        formats: rows used, by format.
        duplicates: rows left out because one that gives the same sample came before.
        cut: samples that were longer than allowed, and lost their end.
        tokens: of the training samples; and ``counted``: those in the loss.
        counted: tokens that count in the loss.
        digest: of all samples, to tell one run from another.
    """

    rows: int
    train: int
    held_out: int
    bad: tuple[BadRow, ...] = ()
    formats: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    cut: int = 0
    tokens: int = 0
    counted: int = 0
    digest: str = ""

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know, in words: nothing where every row was used whole."""
        found = []
        if self.bad:
            found.append(f"{len(self.bad)} of {self.rows} rows left out: {_named(self.bad)}")
        if self.duplicates:
            found.append(f"{self.duplicates} rows left out that repeat an earlier one")
        if self.cut:
            found.append(f"{self.cut} samples cut at the longest length")
        return tuple(found)


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on, samples to judge by, and what became of the rows.

    Args:
        train: samples to train on.
        held_out: samples to take the held-out loss on; they share no row and no paragraph with the others.
        report: what became of the rows.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    report: DataReport


def read_training_data(data: Any, tokenizer: Any, settings: RecoverySettings) -> TrainingData:
    """Read samples and split them at random into training and held-out ones.

    Args:
        data: as for :func:`fxprune.recovery.data.read_rows`.
        tokenizer: the model's.
        settings: format, length, fraction held out, seed.

    Raises:
        DataError: there is no row, no row that can be used, or too few for two parts.
    """
    formatter = Formatter(tokenizer, settings.max_tokens, settings.response_only)
    sorted_rows = _Rows()
    for where, row in read_rows(data):
        sorted_rows.take(where, row, settings.data_format, formatter)
    bad = sorted_rows.bad
    if not sorted_rows.examples and not sorted_rows.texts:
        raise _nothing(data, sorted_rows.number, bad)
    generator = random.Random(settings.seed)
    train, held_out = _parted(sorted_rows.examples, settings.held_out, generator)
    front, back = _parted(_passages(sorted_rows.texts), settings.held_out, generator)
    train += _packed(front, formatter)
    held_out += _packed(back, formatter)
    if not train or not held_out:
        raise DataError(
            f"{len(train)} samples to train on and {len(held_out)} held out",
            where="data",
            remedy="Give more rows, or set held_out to a number of samples that leaves some on both sides",
        )
    samples = (*train, *held_out)
    report = DataReport(
        rows=sorted_rows.number,
        train=len(train),
        held_out=len(held_out),
        bad=tuple(bad),
        formats=dict(sorted_rows.formats),
        duplicates=sorted_rows.duplicates,
        cut=sum(example.cut for example in samples),
        tokens=sum(len(example.ids) for example in train),
        counted=sum(label != IGNORED for example in train for label in example.labels[1:]),
        digest=_digest(samples),
    )
    return TrainingData(tuple(train), tuple(held_out), report)


def collate(examples: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """Return a batch: ids, mask and labels ``(samples, longest)``, padded at the end.

    Args:
        examples: of one batch.
        padding: the id put where nothing is; it is masked and does not count.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), padding)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.ids)] = torch.tensor(example.labels)
        mask[row, : len(example.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Rows:
    """Rows sorted into examples, texts and bad ones as they come."""

    def __init__(self) -> None:
        self.number = self.duplicates = 0
        self.examples: list[Example] = []
        self.texts: list[str] = []
        self.bad: list[BadRow] = []
        self.formats: Counter[str] = Counter()
        self._seen: set[Example | str] = set()

    def take(self, where: str, row: Any, wanted: str, formatter: Formatter) -> None:
        """Sort one row in."""
        self.number += 1
        if isinstance(row, BadRow):
            self.bad.append(row)
            return
        kind, why = kind_of(row, wanted)
        if not kind:
            self.bad.append(BadRow(where, why))
            return
        made = _text(row, where) if kind == "text" else formatter.example(row, kind, where)
        if isinstance(made, BadRow):
            self.bad.append(made)
        elif made in self._seen:  # whatever else the rows hold, such as a number
            self.duplicates += 1
        else:
            self._seen.add(made)
            self.formats[kind] += 1
            if isinstance(made, Example):
                self.examples.append(made)
            else:
                self.texts.append(made)


def _text(row: Any, where: str) -> BadRow | str:
    text = row if isinstance(row, str) else row["text"]
    if not isinstance(text, str) or not text.strip():
        return BadRow(where, "'text' is empty" if isinstance(text, str) else "'text' is not text")
    return text


def _parted(items: Sequence[Any], held_out: float, generator: random.Random) -> tuple[list[Any], list[Any]]:
    """Return two parts at random, both in random order; the second is the one held out."""
    if not items:
        return [], []
    order = list(items)
    generator.shuffle(order)
    number = round(held_out * len(order)) if held_out < 1 else int(held_out)
    number = max(1, number)
    return order[number:], order[:number]


def _passages(texts: Iterable[str]) -> list[list[str]]:
    """Return runs of paragraphs, each paragraph once: short enough to split a text by, long enough to read."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for text in texts:
        run: list[str] = []
        for part in (piece for paragraph in paragraphs(text) for piece in _pieces(paragraph)):
            if part not in seen:
                seen.add(part)
                run.append(part)
            if sum(map(len, run)) >= _PASSAGE:
                found.append(run)
                run = []
        found += [run] if run else []
    return found


def _pieces(paragraph: str) -> Iterator[str]:
    """Yield a paragraph, or runs of its lines where it is as long as two passages, as text without blank lines is."""
    if len(paragraph) < 2 * _PASSAGE:
        yield paragraph
        return
    run = ""
    for line in paragraph.splitlines(keepends=True):
        run += line
        if len(run) >= _PASSAGE:
            yield run.strip()
            run = ""
    if run.strip():
        yield run.strip()


def _packed(passages: Iterable[Sequence[str]], formatter: Formatter) -> list[Example]:
    """Return passages one after the other, parted by the end-of-text token and cut into windows."""
    ids: list[int] = []
    end = formatter.tokenizer.eos_token_id
    for passage in passages:
        ids += formatter.encode("\n\n".join(passage)) + ([] if end is None else [end])
    size = formatter.max_tokens
    windows = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [Example(window, window) for window in windows if len(window) > 1]


def _nothing(data: Any, rows: int, bad: Sequence[BadRow]) -> DataError:
    where = data if isinstance(data, str) else "data"
    expected = "Rows need 'instruction' and 'output', or 'messages', or 'text'; other fields: rename them"
    if not rows:
        return DataError("the data set is empty", where=where, remedy=expected)
    return DataError(f"none of {rows} rows can be used: {_named(bad)}", where=where, remedy=expected)


def _named(bad: Sequence[BadRow]) -> str:
    """Return the reasons why rows are bad, the commonest first, each with its first rows and how many more."""
    by_reason: dict[str, list[str]] = {}
    for row in bad:
        by_reason.setdefault(row.why, []).append(row.where)
    told = [
        f"{why} ({', '.join(rows[:_NAMED])}{f' and {len(rows) - _NAMED} more' if len(rows) > _NAMED else ''})"
        for why, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_NAMED]
    ]
    return "; ".join(told) + ("; ..." if len(by_reason) > _NAMED else "")


def _digest(samples: Iterable[Example]) -> str:
    found = hashlib.sha256()
    for example in samples:
        found.update(repr((example.ids, example.labels)).encode())
    return found.hexdigest()[:16]
