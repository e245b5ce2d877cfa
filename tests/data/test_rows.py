"""Rows: read from each kind of source, told by their fields, and named when they are bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxprune.data.rows import TEMPLATE, TEMPLATE_WITH_INPUT, BadRow, Row, parse_row, read_rows
from fxprune.data.text import calibration_text, read_text
from fxprune.errors import DataError
from fxprune.evaluation.tasks import LocalTask, read_questions

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("row", "wanted", "kind"),
    [
        ({"instruction": "a", "output": "b"}, "auto", "instruction"),
        ({"messages": []}, "auto", "chat"),
        ({"text": "a", "output": None}, "auto", "text"),
        ("a", "text", "text"),
        ("a", "chat", "plain text, not chat"),
        ({"text": "a"}, "chat", "no 'messages'; its fields are ['text']"),
        ({"question": "a"}, "auto", "none of the known fields; its fields are ['question']"),
        (3, "auto", "not an object, but int"),
    ],
)
def test_the_kind_is_told_by_the_fields(row: Any, wanted: str, kind: str) -> None:
    found = parse_row("row 1", row, wanted)
    assert found.where == "row 1" and (found.kind if isinstance(found, Row) else found.why) == kind


def test_sources_of_each_form_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    forms = (
        ("a.json", json.dumps(ROWS), "row"),
        ("b.json", json.dumps({"data": ROWS}), "row"),
        ("c.json", LINES, "line"),
        ("d.jsonl", LINES, "line"),
        ("d.parquet", None, "row"),
    )
    for name, content, place in forms:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        expected = [Row(f"{place} {number}", "text", row) for number, row in enumerate(ROWS, start=1)]
        assert list(read_rows(path)) == list(read_rows(str(path))) == expected
    assert list(read_rows(iter(ROWS))) == [Row("row 1", "text", ROWS[0]), Row("row 2", "text", ROWS[1])]
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")
    assert list(read_rows(tmp_path / "a.txt")) == [Row("a.txt", "text", {"text": "one"})]


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text"\n{"text": "two"}\n')
    first, broken, last = read_rows(path)
    assert (first.where, broken.where, last.where) == ("line 1", "line 3", "line 4")
    assert isinstance(broken, BadRow) and broken.why.startswith("not JSON")


@pytest.mark.parametrize(
    ("data", "content", "says"),
    [
        (7, None, "cannot read 7"),
        ({"text": "one"}, None, "cannot read .'text'"),
        ("rows.json", '{"a": ', "rows.json: not JSON"),
        ("rows.csv", "a,b", r"rows.csv: a \.csv file"),
        ("none.json", None, "none.json: there is no such file"),
        ("rows.txt", "schön", "rows.txt: not UTF-8 text"),
    ],
)
def test_sources_that_hold_no_rows_are_refused(tmp_path: Path, data: Any, content: str | None, says: str) -> None:
    if isinstance(data, str):
        data = tmp_path / data
    if content is not None:
        data.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=says):
        read_rows(data)


def test_a_row_gives_its_text() -> None:
    instruction = {"instruction": "Add.", "output": "4"}
    prompts = (TEMPLATE.format(**instruction), TEMPLATE_WITH_INPUT.format(**instruction, input="1 and 3"))
    for given, prompt in ((" ", prompts[0]), ("1 and 3", prompts[1])):
        assert Row("", "instruction", {**instruction, "input": given}).text() == f"{prompt}4"
    assert Row("", "text", {"text": "a"}).text() == "a"
    assert Row("", "chat", {"messages": [{"content": "a"}, {"content": "b"}]}).text() == "a\n\nb"
    for kind, fields in (
        ("instruction", {"instruction": ["a"], "output": "b"}),
        ("chat", {"messages": [{"content": 3}]}),
        ("chat", {"messages": 3}),
        ("text", {"text": 0}),
    ):
        bad = Row("row 1", kind, fields).text()
        assert isinstance(bad, BadRow) and bad.where == "row 1" and "not" in bad.why


def test_a_line_feed_alone_ends_a_line_of_json(tmp_path: Path) -> None:
    """Strings may hold other line breaks as they are."""
    path = tmp_path / "rows.jsonl"
    texts = ["two\u2028parts", "a\u2029b", "c\x85d", "plain"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8", newline="")
    assert [row.text() for row in read_rows(path) if isinstance(row, Row)] == texts
    assert read_text(path) == calibration_text(path) == "\n\n".join(texts)
    questions = ({"query": text, "choices": ["a", "b"], "gold": 0} for text in texts)
    path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in questions), encoding="utf-8")
    assert [row["query"] for row in read_questions(LocalTask(path))] == texts
    assert len(read_questions(LocalTask(path, start=1, stop=3))) == 2
