"""Calibration samples from files: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxprune.data.text import calibration_text, calibration_windows
from fxprune.errors import CalibrationError, DataError
from tests.tokens import character_tokenizer


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
