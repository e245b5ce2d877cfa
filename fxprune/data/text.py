"""Text of files and data sets, its split into parts that do not overlap, and windows of token ids."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fxprune.data.calibration import spread
from fxprune.data.named import ROW_SUFFIXES, is_data_set
from fxprune.data.rows import BadRow, Row, is_chat, read_rows
from fxprune.data.samples import FileSamples
from fxprune.errors import CalibrationError, DataError
from fxprune.pipeline.arguments import as_path, refuse

MOST_SAMPLES, TOKENS = 1024, 128
"""Samples if no number is given, more than any recipe uses, and tokens of each."""

_REMEDY = (
    "Give a text file in UTF-8; or .json, .jsonl, .parquet or a data set, whose rows have a field 'text', "
    "'instruction' and 'output', or 'messages'"
)


_MOST_TEXT = 8_000_000
"""Characters of a data set that are read, from its beginning: two million tokens of English, more than any recipe uses.

Files are read whole.
"""


def is_text(data: Any) -> bool:
    """Whether data are text, which a tokenizer makes samples of, rather than token ids.

    It is text by name or path, a list of texts, of chats or of rows with text in them, or a ``datasets.Dataset`` of
    such rows, a stream too, or a column of it.
    """
    if isinstance(data, str | os.PathLike):
        return True
    if hasattr(data, "column_names"):
        columns = data.column_names  # None of a stream before its first row is read
        return "input_ids" not in (next(iter(data), {}) if columns is None else columns)
    first = data[0] if isinstance(data, Sequence) and len(data) else None
    if isinstance(first, Mapping):
        return "messages" in first or any(isinstance(value, str) or is_chat(value) for value in first.values())
    return isinstance(first, str) or is_chat(first)


def text_samples(data: Any, tokenizer: Any, samples: int | None, tokens: int, most: int = MOST_SAMPLES) -> FileSamples:
    """Samples of a text that :func:`is_text`, and its source: windows that do not overlap, spread evenly over it.

    Each begins with the tokens that the tokenizer puts before a text. If ``samples`` is None, there are as many as
    fit, up to ``most``.
    """
    count, found = _all_windows(tokenizer, calibration_text(data, tokenizer), tokens)
    wanted = min(max(len(found), 1), most) if samples is None else samples
    if len(found) < wanted:
        what = f"{count:,} tokens are fewer than {wanted:,} sample{'s' if wanted > 1 else ''} of {tokens:,}"
        fewer = "samples of fewer $tokens" if samples is None else "smaller $samples or $tokens"
        raise CalibrationError(what, where=text_source(data), remedy=f"Give a longer text, or {fewer}")
    return FileSamples(found[list(spread(range(len(found)), wanted))], text_source(data), data)


def text_source(data: Any) -> str:
    """Where a text is from: the name of a data set or of a file."""
    if not isinstance(data, str | os.PathLike):
        return "the texts passed"
    return str(data) if is_data_set(data) else Path(data).name


def calibration_text(source: Any, tokenizer: Any = None) -> str:
    """The text of a file, a data set or a list; of rows, the text of each, separated by blank lines.

    Chats are written in the chat template of the tokenizer, and then separated only by what the template ends a chat
    with; without one, their messages are separated by blank lines.

    Args:
        source: a path; the name of a data set, ``"wikitext2"``, ``"c4"``, ``"ptb"`` or ``"owner/name"``; a list of
            texts or rows; or a ``datasets.Dataset``.
    """
    texts = _texts(source, tokenizer)
    parts = [texts[0][0]]
    for (_, before), (text, templated) in pairwise(texts):
        parts += [text] if before and templated else ["\n\n", text]
    return "".join(parts)


def calibration_texts(path: Path) -> list[str]:
    """The texts of a file: one of each row in .json, .jsonl or .parquet; else the whole file."""
    return [text for text, _ in _texts(path)]


def _texts(source: Any, tokenizer: Any = None) -> list[tuple[str, bool]]:
    """Texts, each with whether a chat template wrote it."""
    if isinstance(source, str | os.PathLike) and not is_data_set(source):
        wanted = "the path of a file of text, the name of a data set, or texts in a list"
        path = Path(as_path("text", source, wanted, error=CalibrationError))
        where, most = str(path), math.inf
        if path.is_dir():
            raise CalibrationError("it is a folder", where=where, remedy=_REMEDY)
        is_rows = path.suffix in ROW_SUFFIXES and path.suffix != ".txt"
        rows = read_rows(path) if is_rows else iter([Row(path.name, "text", {"text": _plain_text(path)})])
    else:
        where, most = source if isinstance(source, str) else "calibration", _MOST_TEXT
        rows = read_rows(source)
    texts: list[tuple[str, bool]] = []
    for row in rows:
        texts.append(_row_text(row, where, tokenizer))
        most -= len(texts[-1][0])
        if most < 0:
            break
    if not any(text.strip() for text, _ in texts):
        raise CalibrationError("it has no text", where=where, remedy=_REMEDY)
    return texts


def _plain_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", where=str(path), remedy=_REMEDY) from error
    try:
        text = content.decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        why = f"it is not text in UTF-8: byte {error.start:,} is {content[error.start]:#04x}"
        raise CalibrationError(why, where=str(path), remedy=_REMEDY) from error
    if "\0" in text:
        raise CalibrationError("it is a binary file: it has bytes that are 0", where=str(path), remedy=_REMEDY)
    return text


def _row_text(row: Row | BadRow, where: str, tokenizer: Any) -> tuple[str, bool]:
    if isinstance(row, Row) and row.kind == "chat" and getattr(tokenizer, "chat_template", None):
        try:
            return str(tokenizer.apply_chat_template(list(row.fields["messages"]), tokenize=False)), True
        except Exception as error:  # a template is a program of the model's makers and may raise anything
            why = f"{row.where}: the tokenizer's chat template refuses it: {error}"
            remedy = "Give chats in the roles and the order that the model's template takes"
            raise CalibrationError(why, where=where, remedy=remedy) from error
    text = row if isinstance(row, BadRow) else row.text()
    if isinstance(text, BadRow):
        raise CalibrationError(f"{text.where}: {text.why}", where=where, remedy=_REMEDY)
    return text, False


def opening_tokens(tokenizer: Any) -> list[int]:
    """Token ids that a tokenizer puts before every text, such as a beginning-of-sequence token; empty if none.

    Some models predict well after these tokens alone, which most of their heads attend to.
    """
    if not callable(tokenizer):
        return []
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokenizer("a", verbose=False)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    return list(ids[:start])


def _all_windows(tokenizer: Any, text: str, tokens: int) -> tuple[int, torch.Tensor]:
    """Number of tokens of a text, and windows of it ``(windows, tokens)`` that begin as the tokenizer begins a text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = torch.tensor(opening_tokens(tokenizer), dtype=torch.long)
    body = max(tokens - len(opening), 1)
    rows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    return len(ids), torch.cat([opening.expand(len(rows), -1), rows], dim=1)[:, :tokens]


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> torch.LongTensor:
    """Token ids ``(windows, tokens)`` of windows that do not overlap, in the order of the text.

    Each begins with the tokens that the tokenizer puts before a text. The rest after the last whole window is dropped.
    """
    count, found = _all_windows(tokenizer, text, tokens)
    if not len(found):
        what = f"a text of {count} tokens holds no window of {tokens}"
        raise DataError(what, where="text", remedy="Give a longer text or shorter windows")
    return found  # type: ignore[return-value]


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, stripped, without empty ones; they are separated by blank lines."""
    return (paragraph for part in text.split("\n\n") if (paragraph := part.strip()))


def read_text(path: str | Path) -> str:
    """The text of a local file, records separated by a blank line.

    Args:
        path: a file of text as it is (.txt), or of strings and objects with a field "text" (.jsonl, .json, .parquet).
    """
    path = Path(as_path("path", path, error=DataError))
    texts: list[str] = []
    for row in read_rows(path, "text"):
        text = row if isinstance(row, BadRow) else row.text()
        if isinstance(text, BadRow):
            remedy = 'Give strings or objects with a field "text"'
            raise DataError(f"{text.where}: {text.why}", where=str(path), remedy=remedy)
        texts.append(text)
    return "\n\n".join(texts)


def check_tokenizer(name: str, value: Any) -> Any:
    """Return ``value``, the argument ``name``: a tokenizer, or None."""
    if value is not None and (isinstance(value, type | torch.nn.Module) or not callable(value)):
        raise refuse(name, value, "a tokenizer of transformers, as AutoTokenizer.from_pretrained returns")
    return value


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))


RUN = 16
"""Tokens in a row that two texts do not share by chance, except for phrases such as those of a licence."""


def unseen(windows: torch.Tensor, samples: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mask ``(windows,)`` of the windows ``(windows, tokens)`` that share no run of :data:`RUN` tokens with a sample.

    Samples are token ids ``(..., tokens)``; shorter ones, and shorter windows, are compared whole.
    """
    found = torch.ones(len(windows), dtype=torch.bool)
    by_length: dict[int, list[torch.Tensor]] = {}
    for sample in samples:
        length = min(RUN, windows.shape[-1], sample.shape[-1])
        by_length.setdefault(length, []).append(_hashes(sample, length).flatten())
    for length, seen in by_length.items():
        found &= ~torch.isin(_hashes(windows, length), torch.cat(seen)).any(dim=1)
    return found


def _hashes(ids: torch.Tensor, length: int) -> torch.Tensor:
    """A number of 64 bits for each run of ``length`` token ids ``(..., tokens)``: ``(..., tokens - length + 1)``."""
    factors = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))
    return (ids.cpu().long().unfold(-1, length, 1) * factors).sum(-1)


def unknown_token(token: int, rows: int) -> DataError:
    """The error for a token id of a tokenizer that is none of the ``rows`` of a model's embedding."""
    return DataError(
        f"the tokenizer gives {token}, the model knows 0 to {rows - 1}",
        where="tokenizer",
        remedy="Pass the tokenizer of this model",
        shell="Save the model's own tokenizer in its folder, in place of the one there",
    )
