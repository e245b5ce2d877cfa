"""Text for calibration, training and held-out measurements: read, split with no overlap, and cut into windows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fxprune.data.rows import json_lines
from fxprune.errors import DataError
from fxprune.graph.attempts import clear_errors
from fxprune.pipeline.arguments import as_path, refuse

__all__ = [
    "check_tokenizer",
    "join",
    "paragraphs",
    "read_text",
    "split_calibration_heldout",
    "token_windows",
]


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
