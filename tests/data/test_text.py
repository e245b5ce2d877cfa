"""Text is read, split and cut without any part of it turning up twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxprune.data.built_in import offline_text
from fxprune.data.text import paragraphs, read_text, split_calibration_heldout, token_windows


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
