"""Rows in files: their texts by format, and what needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fxprune.data.rows import TEMPLATE, TEMPLATE_WITH_INPUT, prompt_of, rows_in_file, text_of
from fxprune.errors import DataError


def test_prompts_are_those_of_the_template() -> None:
    fields = {"instruction": "Add.", "output": "4"}
    assert prompt_of(fields) == prompt_of({**fields, "input": " "}) == TEMPLATE.format(**fields)
    assert prompt_of({**fields, "input": "1 and 3"}) == TEMPLATE_WITH_INPUT.format(**fields, input="1 and 3")


def test_a_row_gives_its_text() -> None:
    assert text_of("a", "text") == text_of({"text": "a"}, "text") == "a"
    assert text_of({"instruction": "a", "output": "b"}, "instruction").endswith("a\n\n### Response:\nb")
    assert text_of({"messages": [{"content": "a"}, {"content": "b"}]}, "chat") == "a\n\nb"
    with pytest.raises(DataError, match="should be text"):
        text_of({"instruction": ["a"], "output": "b"}, "instruction")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        rows_in_file(tmp_path / "a.json")


def test_reading_needs_no_torch() -> None:
    code = "import sys, fxprune.data.files, fxprune.data.rows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
