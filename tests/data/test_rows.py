"""Rows in files: their texts by format, and what needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fxprune.data.text import (
    TEMPLATE,
    TEMPLATE_WITH_INPUT,
    calibration_text,
    prompt_of,
    read_text,
    rows_in_file,
    text_of,
)
from fxprune.errors import DataError
from fxprune.evaluation.tasks import LocalTask, read_questions


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


def test_a_line_feed_alone_ends_a_line_of_json(tmp_path: Path) -> None:
    """Strings may hold what else ends a line of text, as it is."""
    path = tmp_path / "rows.jsonl"
    texts = ["two\u2028parts", "a\u2029b", "c\x85d", "plain"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8", newline="")
    assert [row for _, row in rows_in_file(path)] == [{"text": text} for text in texts]
    assert read_text(path) == calibration_text(path) == "\n\n".join(texts)
    questions = ({"query": text, "choices": ["a", "b"], "gold": 0} for text in texts)
    path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in questions), encoding="utf-8")
    assert [row["query"] for row in read_questions(LocalTask(path))] == texts
    assert len(read_questions(LocalTask(path, start=1, stop=3))) == 2


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        rows_in_file(tmp_path / "a.json")


def test_reading_needs_no_torch() -> None:
    code = "import sys, fxprune.data.text, fxprune.data.text; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
