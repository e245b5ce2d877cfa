"""Text of files, its split into parts that do not overlap, and windows of token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import split_calibration_heldout
from fxprune.data.built_in import offline_text
from fxprune.data.text import (
    RUN,
    calibration_text,
    calibration_windows,
    paragraphs,
    read_text,
    token_windows,
    unseen,
)
from fxprune.errors import CalibrationError, DataError
from tests.tokens import character_tokenizer


def characters(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer of one token a character."""
    return {"input_ids": [ord(character) for character in text]}


def test_calibration_and_held_out_text_share_no_paragraph() -> None:
    text = offline_text()
    front, rest = split_calibration_heldout(text, calibration=0.3)
    assert not set(front.split("\n\n")) & set(rest.split("\n\n"))
    assert front + "\n\n" + rest == text and 0.29 < len(front) / len(text) < 0.32
    assert split_calibration_heldout("a\n\nb\n\na\n\nc", calibration=0.5) == ("a\n\nb", "c")
    for short, fraction in (("one paragraph", 0.5), ("a\n\na", 0.5), ("a\n\nb", 0), ("a\n\nb", 1)):
        with pytest.raises(DataError):
            split_calibration_heldout(short, calibration=fraction)
    assert list(paragraphs(" one\nline \n\n\n\n two\n\n")) == ["one\nline", "two"]


def test_read_text_reads_each_format_and_names_the_file_it_refuses(tmp_path: Path) -> None:
    good = (
        "one\n\ntwo",
        '{"text": "one"}\n\n{"text": "two"}\n',
        '["one", {"text": "two"}]',
        '{"text": "one\\n\\ntwo"}',
    )
    for name, content in zip(("a.txt", "a.jsonl", "a.json", "b.json"), good, strict=True):
        (tmp_path / name).write_text(content)
        assert read_text(tmp_path / name) == "one\n\ntwo"
    for name, content in (("a.csv", "text"), ("b.jsonl", '{"body": "one"}'), ("none.txt", None)):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_text(tmp_path / name)


def test_token_windows_follow_the_text_without_overlap() -> None:
    text = "abcdefghij"
    windows = token_windows(characters, text, tokens=3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc", "def", "ghi"]
    assert torch.equal(token_windows(characters, text, tokens=3, limit=2), windows[:2])
    assert token_windows(characters, text, tokens=3, limit=9).shape == (3, 3)
    for tokens, limit in ((11, None), (0, None), (3, 0)):
        with pytest.raises(DataError):
            token_windows(characters, text, tokens=tokens, limit=limit)


def test_windows_are_spread_over_the_text() -> None:
    text = "".join(chr(i) for i in range(100))
    found = calibration_windows(characters, text, 3, 10, "here")
    assert found[:, 0].tolist() == [0, 30, 60] and found.shape == (3, 10)
    assert calibration_windows(characters, text, None, 10, "here").shape == (10, 10)
    assert calibration_windows(characters, "ab" * 3000, None, 2, "here").shape == (1024, 2)
    for samples, tokens in ((11, 10), (None, 101)):
        with pytest.raises(CalibrationError, match=r"here.*100 tokens are fewer than"):
            calibration_windows(characters, text, samples, tokens, "here")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "plain text", "plain text"),
        ("a.md", "plain text", "plain text"),
        ("bom.txt", "\ufeffred", "red"),
        ("bom.json", '\ufeff[{"text": "red"}]', "red"),
        ("a.json", json.dumps([{"text": "one"}, "two"]), "one\n\ntwo"),
        ("a.json", json.dumps({"rows": [{"instruction": "Add.", "output": "4"}]}), "### Response:\n4"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"content": "Ho"}]}), "Hi\n\nHo"),
    ],
)
def test_what_recovery_reads_is_read_for_calibration(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = calibration_text(tmp_path / name)
    assert found.endswith(text) and "\ufeff" not in found


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
        ("a.txt", b"", "it has no text"),
        ("a.txt", b"\n \n", "it has no text"),
        ("none.txt", None, "it cannot be read: No such file"),
        (".", None, "it is a folder"),
        ("a.txt", b"\x89PNG\r\n", "byte 0 is 0x89"),
        ("a.txt", b"GGUF\0\0", "binary file"),
        ("a.txt", "schön".encode("latin-1"), "not text in UTF-8: byte 3"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[]", "it has no text"),
        ("a.json", b"[3]", "row 1: not an object, but int"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 7}', "line 1: 'text' is not text, but int"),
        ("a.jsonl", b'{"messages": []}', "line 1: 'messages' is not a list of messages"),
        ("a.json", b'{"question": "a"}', "row 1: none of the known fields; its fields are .'question'"),
    ],
)
def test_files_without_text_are_refused(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((CalibrationError, DataError), match=says):
        calibration_text(tmp_path / name)


def test_a_window_with_a_run_of_a_sample_was_seen() -> None:
    windows = torch.arange(400).view(4, 100)
    sample = torch.full((1, 50), 999)
    sample[0, 10 : 10 + RUN] = torch.arange(250, 250 + RUN)
    assert unseen(windows, [sample]).tolist() == [True, True, False, True]
    sample[0, 10] = 999  # one token fewer in a row
    assert unseen(windows, [sample]).all()
    assert unseen(windows, []).all()


@pytest.mark.parametrize(("sample", "expected"), [([5, 6, 7], [False, True]), ([7, 6, 5], [True, True])])
def test_short_samples_and_windows_are_compared_whole(sample: list[int], expected: list[bool]) -> None:
    assert unseen(torch.arange(40).view(2, 20), [torch.tensor([sample])]).tolist() == expected
    assert unseen(torch.arange(20).view(2, 10), [torch.arange(30)[None]]).tolist() == [False, False]
