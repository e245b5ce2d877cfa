"""Calibration samples from a file of text. What can be checked of the file needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fxprune.data.rows import SUFFIXES, BadRow, kind_of, rows_in_file, text_of
from fxprune.errors import CalibrationError, DataError

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_SAMPLES", "calibration_text", "calibration_texts", "calibration_windows"]

MOST_SAMPLES = 1024
"""Where no number is asked for: more than the recipes have use for would only have to be read."""

_WANTED = (
    "Give a text file in UTF-8; or .json, .jsonl or .parquet, whose rows have a field 'text', 'instruction' and "
    "'output', or 'messages'"
)


def calibration_text(path: Path, tokenizer: Any = None) -> str:
    """Return the text of a file; of rows of data, the text of each, parted by blank lines.

    Between two chats in a template there is nothing but what it ends them with.

    Args:
        path: of text or of rows.
        tokenizer: its template for chats, where it has one, is what chats are written in; else their messages stand
            below each other.

    Raises:
        CalibrationError: there is no text in it, or a row is of no known form, or one that the template refuses.
        DataError: it is not there, or cannot be read.
    """
    texts = _texts(path, tokenizer)
    seams = ("" if a.templated and b.templated else "\n\n" for a, b in pairwise(texts))
    return texts[0].text + "".join(seam + row.text for seam, row in zip(seams, texts[1:], strict=True))


def calibration_texts(path: Path) -> list[str]:
    """Return the texts of a file: of rows in .json, .jsonl or .parquet the text of each; else the whole.

    The rows are those that :func:`fxprune.recover` reads: texts, instructions with their outputs, and chats, whose
    messages stand below each other.

    Raises:
        CalibrationError: there is no text in it, or a row is of no known form.
        DataError: it is not there, or cannot be read.
    """
    return [row.text for row in _texts(path)]


class _Text(NamedTuple):
    """A text, and whether it is a chat in a template."""

    text: str
    templated: bool = False


def _texts(path: Path, tokenizer: Any = None) -> list[_Text]:
    if path.is_dir():
        raise CalibrationError("it is a folder", where=str(path), remedy=_WANTED)
    of_rows = path.suffix in SUFFIXES and path.suffix != ".txt"
    texts = list(_texts_of_rows(path, tokenizer)) if of_rows else [_Text(_plain(path))]
    if not any(row.text.strip() for row in texts):
        raise CalibrationError("there is no text in it", where=str(path), remedy=_WANTED)
    return texts


def _plain(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", where=str(path), remedy=_WANTED) from error
    try:
        text = content.decode("utf-8-sig")  # some editors mark the beginning
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"it is no text in UTF-8: byte {error.start:,} is {content[error.start]:#04x}",
            where=str(path),
            remedy=_WANTED,
        ) from error
    if "\0" in text:
        raise CalibrationError("it is a binary file: it has bytes that are 0", where=str(path), remedy=_WANTED)
    return text


def _texts_of_rows(path: Path, tokenizer: Any) -> Iterator[_Text]:
    template = getattr(tokenizer, "chat_template", None)
    for where, row in rows_in_file(path):
        kind, why = ("", row.why) if isinstance(row, BadRow) else kind_of(row, "auto")
        if not kind:
            raise CalibrationError(f"{where}: {why}", where=str(path), remedy=_WANTED)
        templated = bool(template) and kind == "chat"
        yield _Text(_templated(tokenizer, row["messages"], where, path) if templated else text_of(row, kind), templated)


def _templated(tokenizer: Any, messages: Any, where: str, path: Path) -> str:
    """A chat in the words that the model was trained to read it in."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # a template is a program of the model's makers, and refuses in its own ways
        told = f"{where}: the tokenizer's chat template refuses it: {error}"
        remedy = "Give chats in the roles and the order that the model's template takes"
        raise CalibrationError(told, where=str(path), remedy=remedy) from error


def calibration_windows(tokenizer: Any, text: str, samples: int | None, tokens: int, where: str) -> torch.Tensor:
    """Return token ids ``(samples, tokens)``: windows that do not overlap, spread evenly over the text.

    Args:
        tokenizer: turns text into ids; no special tokens are added.
        text: what to cut.
        samples: how many; None for as many as there are, up to 1,024.
        tokens: of a window.
        where: the text comes from, for the message.

    Raises:
        CalibrationError: the text is too short.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // tokens
    samples = min(max(windows, 1), MOST_SAMPLES) if samples is None else samples
    if windows < samples:
        raise CalibrationError(
            f"{len(ids):,} tokens are fewer than {samples:,} sample{'s' if samples > 1 else ''} of {tokens:,}",
            where=where,
            remedy="Give a longer text, or smaller --samples or --tokens",
        )
    starts = [i * windows // samples * tokens for i in range(samples)]
    return torch.tensor([ids[start : start + tokens] for start in starts])
