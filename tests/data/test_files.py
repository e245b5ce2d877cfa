"""Calibration samples from files: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxprune.data.files import calibration_text, calibration_windows
from fxprune.errors import CalibrationError


def letters(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer that knows letters."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_spread_over_the_text() -> None:
    text = "".join(chr(i) for i in range(100))
    found = calibration_windows(letters, text, 3, 10, "here")
    assert found[:, 0].tolist() == [0, 30, 60] and found.shape == (3, 10)
    assert calibration_windows(letters, text, None, 10, "here").shape == (10, 10)
    assert calibration_windows(letters, "ab" * 3000, None, 2, "here").shape == (1024, 2)
    for samples, tokens in ((11, 10), (None, 101)):
        with pytest.raises(CalibrationError, match=r"here.*100 tokens are fewer than"):
            calibration_windows(letters, text, samples, tokens, "here")


def test_lines_of_json_are_read_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in ("one", "two")) + "\n\n")
    assert calibration_text(path) == "one\n\ntwo"
    path.write_text('{"words": "one"}')
    with pytest.raises(CalibrationError, match="not JSON lines"):
        calibration_text(path)
