"""Texts of the quality benchmark: to calibrate on, and to measure on."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import split_calibration_heldout
from benchmarks.quality.rows import Protocol
from fxprune.data.built_in import general_text, offline_text
from fxprune.data.text import calibration_text, calibration_texts, token_windows

_KEPT_BACK = 8
"""One row in as many of the calibration text is measured on, and not calibrated on."""

_MODULES = (
    "bisect cmd code codeop copy csv fnmatch glob heapq linecache netrc queue reprlib sched selectors shelve shlex "
    "stat timeit trace uuid wave weakref zipapp"
)
"""Modules of the standard library in all supported versions; tuning stops early by docstrings of none of them."""


@dataclass(frozen=True)
class Texts:
    """Texts to calibrate and to measure on; no row of the one is in the others.

    Attributes:
        calibration: All samples of the text: `(samples, tokens)`.
        heldout: Texts to measure on, by name.
    """

    calibration: torch.Tensor
    heldout: dict[str, str]


def python_code() -> str:
    """Source code of modules of Python's standard library; it differs a little from version to version."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES.split())


def read_texts(
    tokenizer: Any, data: Path | None, calibration: str, protocol: Protocol, more: Sequence[Path] = ()
) -> Texts:
    """Read the texts.

    Args:
        tokenizer: Turns text into ids.
        data: Folder of texts, `*.txt` and `*/test.txt` of which are measured on; None for built-in text.
        calibration: Name of the file in the folder to calibrate on, some rows of which may be measured on.
        protocol: Sizes of samples, and the rows that are kept back.
        more: Files of further texts to measure on.
    """
    held: dict[str, str] = {}
    if data is None:
        front, back = split_calibration_heldout(general_text(), calibration=0.75)
        held |= {"the rest of the general text": back, "Python's reference": offline_text()}
    else:
        path = data / calibration
        front = calibration_text(path)
        if protocol.kept_back:
            rows = calibration_texts(path)
            apart = rows[protocol.kept_back - 1 :: protocol.kept_back]
            front = "\n\n".join(row for row in rows if row not in set(apart))
            held[f"{calibration}, kept back"] = "\n\n".join(apart)
        files = [*sorted(data.glob("*.txt")), *sorted(data.glob("*/test.txt"))]
        held |= {str(path.relative_to(data)): calibration_text(path) for path in files if path.name != calibration}
    held[f"code of Python {'.'.join(platform.python_version_tuple()[:2])}"] = python_code()
    held |= {path.name: calibration_text(path) for path in more}
    return Texts(token_windows(tokenizer, front, protocol.tokens), held)


def kept_back(data: Path | None, calibration: str) -> int:
    """Of how many rows of a calibration text one is measured on; 0 for none, where it has too few."""
    rows = [] if data is None else calibration_texts(data / calibration)
    return _KEPT_BACK if len(rows) >= _KEPT_BACK else 0


def beginning(tokenizer: Any, text: str, tokens: int | None) -> str:
    """The beginning of a text that has a number of tokens, or the whole text if it has fewer; None for all."""
    if tokens is None:
        return text
    ends = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: ends[tokens - 1][1]] if len(ends) >= tokens else text
