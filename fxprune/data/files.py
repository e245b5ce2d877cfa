"""Calibration samples from a file of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import CalibrationError

__all__ = ["calibration_text", "calibration_texts", "calibration_windows"]

_MOST_SAMPLES = 1024
"""Where no number is asked for: more than the recipes have use for would only have to be read."""


def calibration_text(path: Path) -> str:
    """Return the text of a file; of JSON lines, the field ``text`` of each, parted by blank lines.

    Raises:
        CalibrationError: a line is no JSON object with a field ``text``.
    """
    return "\n\n".join(calibration_texts(path))


def calibration_texts(path: Path) -> list[str]:
    """Return the texts of a file: of JSON lines, the field ``text`` of each; else the whole.

    Raises:
        CalibrationError: a line is no JSON object with a field ``text``.
    """
    content = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".jsonl":
        return [content]
    try:
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Each line has to be a JSON object with a field 'text'"
        raise CalibrationError(f"not JSON lines: {error!r}", where=str(path), remedy=remedy) from error


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
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // tokens
    samples = min(max(windows, 1), _MOST_SAMPLES) if samples is None else samples
    if windows < samples:
        raise CalibrationError(
            f"{len(ids):,} tokens are fewer than {samples} samples of {tokens}",
            where=where,
            remedy="Give a longer text, or smaller --samples or --tokens",
        )
    starts = [i * windows // samples * tokens for i in range(samples)]
    return torch.tensor([ids[start : start + tokens] for start in starts])
