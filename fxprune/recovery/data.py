"""Training and held-out samples: read, formatted, packed, without overlap."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fxprune.data.built_in import built_in_text
from fxprune.data.calibration import IGNORED
from fxprune.data.rows import BadRow, Row, read_rows
from fxprune.data.text import common_prefix, paragraphs
from fxprune.errors import DataError
from fxprune.recovery.settings import RecoverySettings

_LONGEST = 80
"""Characters of a chat template's error that are repeated: rows are grouped by the reason, which must stay short."""

_LISTED = 5
"""Reasons, and rows of each, that a message names: they fit a few lines."""

_PASSAGE = 2000
"""Characters of the runs of paragraphs that a text is split into: about two samples of the default length."""


@dataclass(frozen=True)
class Example:
    """One training sample: ids, and labels with IGNORED for tokens that do not count in the loss.

    ``cut`` says whether it was longer than allowed.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Formatter:
    """Turns rows of instructions and chats into examples; ``response_only`` leaves prompts out of the loss."""

    tokenizer: Any
    max_tokens: int
    response_only: bool

    def example(self, row: Row) -> Example | BadRow:
        """The example of a row with a prompt, or of a chat, or the reason why there is none."""
        made = self._chat(row.fields["messages"]) if row.kind == "chat" else self._pair(row)
        if isinstance(made, str):
            return BadRow(row.where, made)
        ids, labels = (tuple(tokens[: self.max_tokens]) for tokens in made)
        if all(label == IGNORED for label in labels[1:]):
            return BadRow(row.where, f"no response within {self.max_tokens} tokens")
        return Example(ids, labels, len(made[0]) > self.max_tokens)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; ``special`` adds the tokens that the tokenizer puts around a text."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def pack(self, passages: Iterable[Sequence[str]]) -> list[Example]:
        """Windows of passages, which are joined by the end-of-text token."""
        ids: list[int] = []
        end = self.tokenizer.eos_token_id
        for passage in passages:
            ids += self.encode("\n\n".join(passage)) + ([] if end is None else [end])
        windows = [tuple(ids[start : start + self.max_tokens]) for start in range(0, len(ids), self.max_tokens)]
        return [Example(window, window) for window in windows if len(window) > 1]

    def _pair(self, row: Row) -> tuple[list[int], list[int]] | str:
        texts = row.texts()
        if isinstance(texts, BadRow):
            return texts.why
        for name, text in texts.items():
            if name != "input" and not text.strip():
                return f"{name!r} is empty"
        prompt = row.prompt(texts)
        whole = self.encode(prompt + row.response(texts), special=True)
        end = self.tokenizer.eos_token_id
        if end is not None and whole[-1:] != [end]:
            whole.append(end)
        # the last token of a prompt may merge with the text after it
        start = common_prefix(whole, self.encode(prompt, special=True)) if self.response_only else 0
        return whole, [IGNORED] * start + whole[start:]

    def _chat(self, messages: Any) -> tuple[list[int], list[int]] | str:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            return "'messages' is not a list of messages"
        for message in messages:
            fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(field, str) for field in fields):
                return "a message without 'role' and 'content' as text"
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            return "no message of the assistant"
        if not getattr(self.tokenizer, "chat_template", None):
            return "a chat, but the tokenizer has no chat template"
        try:
            whole = self._render(messages)
            if not self.response_only:
                return whole, whole
            labels = [IGNORED] * len(whole)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = common_prefix(whole, self._render(messages[:turn], prompt=True)) if turn else 0
                    end = common_prefix(whole, self._render(messages[: turn + 1]))
                    labels[start:end] = whole[start:end]
        except Exception as error:  # a template is a program of the tokenizer's makers and may raise anything
            return f"the chat template refuses it: {type(error).__name__}: {str(error)[:_LONGEST]}"
        return whole, labels

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return self.encode(text)


@dataclass(frozen=True)
class DataReport:
    """Use of the rows that were read.

    Args:
        train: number of training samples; windows, of plain text.
        duplicates: rows left out because an earlier one gives the same sample.
        cut: samples that were longer than allowed and lost their end.
        tokens: tokens of the training samples.
        counted: those of them that count in the loss.
        digest: fingerprint of all samples.
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
        """Rows and samples that were not used whole, in words; empty if all were."""
        found = []
        if self.bad:
            found.append(f"{len(self.bad)} of {self.rows} rows left out: {_format_reasons(self.bad)}")
        if self.duplicates:
            found.append(f"{self.duplicates} rows left out that repeat an earlier one")
        if self.cut:
            found.append(f"{self.cut} samples cut at the longest length")
        return tuple(found)


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out samples, which share no row and no paragraph, and the use of the rows."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    report: DataReport


def read_training_data(data: Any, tokenizer: Any, settings: RecoverySettings) -> TrainingData:
    """Read samples and split them at random into training and held-out ones.

    Args:
        data: as for :func:`fxprune.data.rows.read_rows`; None for the built-in text.

    Raises:
        DataError: there is no row, no row that can be used, or too few for two parts.
    """
    formatter = Formatter(tokenizer, settings.max_tokens, settings.response_only)
    made: dict[Example | str, None] = {}  # the samples alone decide: rows may differ in other fields, such as a number
    bad: list[BadRow] = []
    formats: Counter[str] = Counter()
    number = duplicates = 0
    for row in read_rows([built_in_text()] if data is None else data, settings.data_format):
        number += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        sample = formatter.example(row) if row.kind != "text" else row.text()  # texts are packed later
        if isinstance(sample, str) and not sample.strip():
            sample = BadRow(row.where, "'text' is empty")
        if isinstance(sample, BadRow):
            bad.append(sample)
        elif sample in made:
            duplicates += 1
        else:
            made[sample] = None
            formats[row.kind] += 1
    if not made:
        what = f"none of {number} rows can be used: {_format_reasons(bad)}" if number else "the data set is empty"
        remedy = "Rows need 'instruction' and 'output', or 'messages', or 'text'; rename other fields"
        raise DataError(what, where=data if isinstance(data, str) else "data", remedy=remedy)
    generator = random.Random(settings.seed)
    train, held_out = _split([one for one in made if isinstance(one, Example)], settings.held_out, generator)
    front, back = _split(_passages(one for one in made if isinstance(one, str)), settings.held_out, generator)
    train += formatter.pack(front)
    held_out += formatter.pack(back)
    if not train or not held_out:
        what = f"{len(train)} samples to train on and {len(held_out)} held out"
        remedy = "Give more rows, or set $held_out to a number of samples that leaves some on both sides"
        raise DataError(what, where="data", remedy=remedy)
    samples, digest = (*train, *held_out), hashlib.sha256()
    for example in samples:
        digest.update(repr((example.ids, example.labels)).encode())
    report = DataReport(
        rows=number,
        train=len(train),
        held_out=len(held_out),
        bad=tuple(bad),
        formats=dict(formats),
        duplicates=duplicates,
        cut=sum(example.cut for example in samples),
        tokens=sum(len(example.ids) for example in train),
        counted=sum(label != IGNORED for example in train for label in example.labels[1:]),
        digest=digest.hexdigest()[:16],
    )
    return TrainingData(tuple(train), tuple(held_out), report)


def collate(examples: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """A batch: ids, mask and labels ``(samples, longest)``; padding at the end is masked and does not count."""

    def padded(rows: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded((example.ids for example in examples), padding),
        "attention_mask": padded(([1] * len(example.ids) for example in examples), 0),
        "labels": padded((example.labels for example in examples), IGNORED),
    }


def _split(items: Sequence[Any], held_out: float, generator: random.Random) -> tuple[list[Any], list[Any]]:
    """Split items at random into a part to train on and a held-out one, both in random order."""
    if not items:
        return [], []
    order = list(items)
    generator.shuffle(order)
    number = max(1, round(held_out * len(order)) if held_out < 1 else int(held_out))
    return order[number:], order[:number]


def _passages(texts: Iterable[str]) -> list[list[str]]:
    """Runs of paragraphs, each paragraph once: short enough to split a text into, long enough to read.

    Of a paragraph as long as two passages, as text without blank lines is, runs of its lines take the place.
    """
    found: list[list[str]] = []
    seen: set[str] = set()
    for text in texts:
        fresh: dict[str, None] = {}
        for paragraph in paragraphs(text):
            is_long = len(paragraph) >= 2 * _PASSAGE
            lines = _runs(paragraph.splitlines(keepends=True)) if is_long else [[paragraph]]
            fresh |= dict.fromkeys("".join(run).strip() for run in lines)
        found += _runs(piece for piece in fresh if piece not in seen)
        seen.update(fresh)
    return found


def _runs(parts: Iterable[str]) -> Iterator[list[str]]:
    """Yield runs of parts with the characters of a passage, or a few more; the last may have fewer."""
    run: list[str] = []
    for part in parts:
        run.append(part)
        if sum(map(len, run)) >= _PASSAGE:
            yield run
            run = []
    if run:
        yield run


def _format_reasons(bad: Sequence[BadRow]) -> str:
    """Reasons why rows are bad, the commonest first, each with its first rows and the number of others."""
    by_reason: dict[str, list[str]] = {}
    for row in bad:
        by_reason.setdefault(row.why, []).append(row.where)
    listed = []
    for why, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_LISTED]:
        more = f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
        listed.append(f"{why} ({', '.join(rows[:_LISTED])}{more})")
    return "; ".join(listed) + ("; ..." if len(by_reason) > _LISTED else "")
