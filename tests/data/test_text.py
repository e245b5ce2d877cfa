"""Tests: rows and text in files, and their split into parts that do not overlap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxprune.data.built_in import offline_text
from fxprune.data.text import (
    TEMPLATE,
    TEMPLATE_WITH_INPUT,
    calibration_text,
    calibration_windows,
    paragraphs,
    prompt_of,
    read_text,
    rows_in_file,
    split_calibration_heldout,
    text_of,
    token_windows,
)
from fxprune.errors import CalibrationError, DataError
from fxprune.evaluation.tasks import LocalTask, read_questions
from tests.tokens import character_tokenizer


class _Bytes:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_split_parts_share_no_paragraph() -> None:
    text = offline_text()
    front, rest = split_calibration_heldout(text, calibration=0.3)
    assert not set(front.split("\n\n")) & set(rest.split("\n\n"))
    assert text.startswith(front)
    assert text.endswith(rest)
    assert len(front) + len("\n\n") + len(rest) == len(text)
    assert 0.29 < len(front) / len(text) < 0.32


def test_split_drops_heldout_paragraphs_that_calibration_has() -> None:
    assert split_calibration_heldout("a\n\nb\n\na\n\nc", calibration=0.5) == ("a\n\nb", "c")


@pytest.mark.parametrize(("text", "fraction"), [("one paragraph", 0.5), ("a\n\na", 0.5), ("a\n\nb", 0), ("a\n\nb", 1)])
def test_split_refuses_what_leaves_a_part_empty(text: str, fraction: float) -> None:
    with pytest.raises(ValueError):
        split_calibration_heldout(text, calibration=fraction)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\ntwo"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'),
        ("a.json", '["one", {"text": "two"}]'),
        ("b.json", '{"text": "one\\n\\ntwo"}'),
    ],
)
def test_read_text_reads_each_format(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_text(path) == "one\n\ntwo"


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text"), ("a.jsonl", '{"body": "one"}')])
def test_read_text_names_the_file_it_refuses(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=name):
        read_text(path)


def test_token_windows_follow_the_text_without_overlap() -> None:
    text = "abcdefghij"
    windows = token_windows(_Bytes(), text, tokens=3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc", "def", "ghi"]
    assert torch.equal(token_windows(_Bytes(), text, tokens=3, limit=2), windows[:2])
    assert token_windows(_Bytes(), text, tokens=3, limit=9).shape == (3, 3)


@pytest.mark.parametrize(("tokens", "limit"), [(11, None), (0, None), (3, 0)])
def test_token_windows_refuse_what_holds_no_window(tokens: int, limit: int | None) -> None:
    with pytest.raises(ValueError):
        token_windows(_Bytes(), "abcdefghij", tokens=tokens, limit=limit)


def test_paragraphs_are_parted_by_blank_lines() -> None:
    assert list(paragraphs(" one\nline \n\n\n\n two\n\n")) == ["one\nline", "two"]


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


def test_a_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: it cannot be read: No such file"):
        calibration_text(tmp_path / "none.txt")


def test_lines_of_json_are_read_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in ("one", "two")) + "\n\n")
    assert calibration_text(path) == "one\n\ntwo"
    path.write_text('{"words": "one"}')
    with pytest.raises(CalibrationError, match="line 1: none of the known fields"):
        calibration_text(path)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "plain text", "plain text"),
        ("a.md", "plain text", "plain text"),
        ("a.json", json.dumps([{"text": "one"}, "two"]), "one\n\ntwo"),
        ("a.json", json.dumps({"rows": [{"instruction": "Add.", "output": "4"}]}), "### Response:\n4"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"content": "Ho"}]}), "Hi\n\nHo"),
    ],
)
def test_what_recovery_reads_is_read_for_calibration(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content)
    assert calibration_text(tmp_path / name).endswith(text)


def test_chats_are_written_in_the_template_that_the_model_knows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": chat}, {"messages": chat}, {"text": "one"})))
    tokenizer = character_tokenizer(chat=True)
    said = tokenizer.apply_chat_template(chat, tokenize=False)
    assert said not in ("", "Hi\n\nHo")
    assert calibration_text(path, tokenizer) == f"{said}{said}\n\none", "a template says itself how a chat ends"
    plain = "Hi\n\nHo\n\nHi\n\nHo\n\none"
    assert calibration_text(path, character_tokenizer()) == calibration_text(path) == plain
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"line 1: .* template refuses it: roles must alternate"):
        calibration_text(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text in it"),
        ("a.txt", b"\n \n", "no text in it"),
        ("a.txt", b"\x89PNG\r\n", "byte 0 is 0x89"),
        ("a.txt", b"GGUF\0\0", "binary file"),
        ("a.txt", "schön".encode("latin-1"), "no text in UTF-8: byte 3"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[]", "no text in it"),
        ("a.json", b"[3]", "row 1: a int, not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 7}', "should be text"),
        ("a.jsonl", b'{"messages": []}', "should be text"),
        ("a.json", b'{"question": "a"}', "its fields are .'question'"),
    ],
)
def test_what_is_no_text_is_told_by_what_was_found(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CalibrationError, DataError), match=says):
        calibration_text(tmp_path / name)


def test_a_folder_is_no_file_of_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="it is a folder"):
        calibration_text(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "red"), ("a.json", '[{"text": "red"}]')])
def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    """A JSON file that an editor had marked as UTF-8 was refused, and the mark was a token of a text."""
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert calibration_text(tmp_path / name) == "red"
