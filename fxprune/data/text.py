"""Rows and text in files, and their split into parts that do not overlap."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fxprune.errors import CalibrationError, DataError
from fxprune.graph.context import clear_errors, quiet
from fxprune.pipeline.arguments import as_path, refuse

if TYPE_CHECKING:
    import torch

__all__ = [
    "MOST_SAMPLES",
    "SUFFIXES",
    "TEMPLATE",
    "TEMPLATE_WITH_INPUT",
    "BadRow",
    "calibration_text",
    "calibration_texts",
    "calibration_windows",
    "check_tokenizer",
    "join",
    "json_lines",
    "kind_of",
    "load_rows",
    "numbered",
    "paragraphs",
    "prompt_of",
    "read_text",
    "rows_in_file",
    "split_calibration_heldout",
    "text_of",
    "token_windows",
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


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, stripped, without empty ones; blank lines part them."""
    return (paragraph for part in text.split("\n\n") if (paragraph := part.strip()))


def read_text(path: str | Path) -> str:
    """Return the text of a local file, records parted by a blank line.

    Args:
        path: ``.txt`` (taken as it is), ``.jsonl`` (an object with a field "text" on each line) or ``.json`` (a
            string, an object with a field "text", or a list of these).

    Raises:
        DataError: the file has another suffix, or a record without text.
    """
    path = Path(as_path("path", path, error=DataError))
    with clear_errors(str(path), "Give a text file in UTF-8, .txt, .jsonl or .json", DataError):
        return _text_of(path)


def _text_of(path: Path) -> str:
    content = path.read_text(encoding="utf-8-sig")  # some editors mark the beginning
    if path.suffix == ".txt":
        return content
    if path.suffix == ".jsonl":
        records = [json.loads(line) for _, line in json_lines(content)]
    elif path.suffix == ".json":
        loaded = json.loads(content)
        records = loaded if isinstance(loaded, list) else [loaded]
    else:
        raise DataError(
            f"cannot read text from a {path.suffix or 'suffixless'} file",
            where=str(path),
            remedy="Give .txt, .jsonl or .json",
        )
    return "\n\n".join(_record_text(record, path, number) for number, record in enumerate(records, start=1))


def split_calibration_heldout(text: str, calibration: float = 0.5) -> tuple[str, str]:
    """Split a text into calibration and held-out text that share no character and no paragraph.

    The text is cut at the paragraph border nearest after the given fraction of its characters. Calibration
    text is what stands before it, held-out text what stands after it, less the paragraphs that calibration
    text has as well.

    Args:
        text: paragraphs parted by blank lines.
        calibration: fraction of the characters that goes to calibration, between 0 and 1.

    Returns:
        The calibration text and the held-out text.

    Raises:
        DataError: the fraction is out of range, or one of the two parts would be empty.
    """
    if not 0 < calibration < 1:
        raise refuse("calibration", calibration, "a fraction between 0 and 1", DataError)
    parts = list(paragraphs(text))
    wanted = calibration * sum(map(len, parts))
    front: list[str] = []
    taken = 0
    for paragraph in parts:
        if taken >= wanted:
            break
        front.append(paragraph)
        taken += len(paragraph)
    seen = set(front)
    rest = [paragraph for paragraph in parts[len(front) :] if paragraph not in seen]
    if not front or not rest:
        raise DataError(
            f"{len(parts)} paragraphs leave no held-out text after {calibration:.0%} for calibration",
            where="text",
            remedy="Give a longer text, with blank lines between its paragraphs",
        )
    return join(front), join(rest)


def check_tokenizer(value: Any) -> None:
    """Refuse what turns no text into token ids; None stands for no tokenizer.

    Raises:
        ArgumentError: it cannot be called with a text.
    """
    if value is not None and (isinstance(value, type) or not callable(value)):
        raise refuse("tokenizer", value, "a tokenizer of transformers, as AutoTokenizer.from_pretrained gives")


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, limit: int | None = None
) -> torch.LongTensor:
    """Cut a text into windows of equal length that do not overlap, in the order of the text.

    Args:
        tokenizer: turns text into ids; no special tokens are added.
        text: what to cut; what is left after the last whole window is dropped.
        tokens: length of a window.
        limit: the most windows to return; None for all.

    Returns:
        Token ids ``(windows, tokens)``.

    Raises:
        DataError: the text is shorter than one window, or a number is not positive.
    """
    if tokens < 1 or (limit is not None and limit < 1):
        raise DataError(f"tokens={tokens} and limit={limit}", where="tokens", remedy="Pass positive numbers")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // tokens if limit is None else min(limit, len(ids) // tokens)
    if not windows:
        raise DataError(
            f"a text of {len(ids)} tokens holds no window of {tokens}",
            where="text",
            remedy="Give a longer text or shorter windows",
        )
    return torch.LongTensor(ids[: windows * tokens]).view(windows, tokens)  # type: ignore[return-value]


def join(paragraphs: Iterable[str]) -> str:
    """Return one text of many paragraphs, blank lines between them."""
    return "\n\n".join(paragraphs)


def _record_text(record: Any, path: Path, number: int) -> str:
    """The text of one JSON record, a string or an object with a field "text"."""
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise DataError(
            f"record {number} has no text", where=str(path), remedy='Give strings or objects with a field "text"'
        )
    return text
