"""Rows come with their place, whatever they are read from, and broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxprune.data.built_in import built_in_text
from fxprune.data.text import BadRow
from fxprune.errors import DataError
from fxprune.recovery.data import read_rows

ROWS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.json", json.dumps(ROWS), "row"),
        ("a.json", json.dumps({"data": ROWS}), "row"),
        ("a.json", "\n".join(map(json.dumps, ROWS)), "line"),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)), "line"),
    ],
)
def test_files_of_each_form_give_the_same_rows(tmp_path: Path, name: str, content: str, place: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert list(read_rows(path)) == [(f"{place} 1", ROWS[0]), (f"{place} 2", ROWS[1])]
    assert list(read_rows(str(path))) == list(read_rows(path))


def test_rows_in_memory_and_the_built_in_text_have_a_place() -> None:
    assert list(read_rows(iter(ROWS))) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]
    assert list(read_rows(None)) == [("the built-in text", built_in_text())]


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text"\n{"text": "two"}\n')
    found = dict(read_rows(path))
    assert list(found) == ["line 1", "line 3", "line 4"]
    assert isinstance(found["line 3"], BadRow) and found["line 3"].why.startswith("not JSON")


@pytest.mark.parametrize(
    ("data", "says"),
    [(7, "cannot read 7"), ({"text": "one"}, "cannot read .'text'"), (Path("a.csv"), r"a \.csv file")],
)
def test_what_holds_no_rows_is_refused(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_rows(data)
