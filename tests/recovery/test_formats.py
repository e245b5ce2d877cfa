"""Rows become token ids, of which the answers count."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.data.calibration import IGNORED
from fxprune.data.text import TEMPLATE, TEMPLATE_WITH_INPUT, BadRow, kind_of
from fxprune.recovery.data import Example, Formatter
from tests.tokens import character_tokenizer


@pytest.mark.parametrize(
    ("row", "wanted", "kind"),
    [
        ({"instruction": "a", "output": "b"}, "auto", "instruction"),
        ({"messages": []}, "auto", "chat"),
        ({"text": "a", "output": None}, "auto", "text"),
        ("a", "text", "text"),
        ("a", "chat", ""),
        ({"text": "a"}, "chat", ""),
        ({"question": "a"}, "auto", ""),
        (3, "auto", ""),
    ],
)
def test_the_format_is_told_by_the_fields(row: Any, wanted: str, kind: str) -> None:
    found, why = kind_of(row, wanted)
    assert found == kind and bool(why) != bool(kind)


@pytest.mark.parametrize("given", ["", "3"])
def test_an_instruction_counts_its_output_and_the_end(given: str) -> None:
    tokenizer = character_tokenizer()
    row = {"instruction": "Add.", "input": given, "output": "Four"}
    example = Formatter(tokenizer, 1000, True).example(row, "instruction", "row 1")
    assert isinstance(example, Example) and not example.cut
    counted = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(counted) == "Four</s>"
    prompt = (TEMPLATE_WITH_INPUT if given else TEMPLATE).format(**row)
    assert tokenizer.decode(example.ids) == f"{prompt}Four</s>"


def test_what_makes_no_example_is_a_bad_row() -> None:
    formatter = Formatter(character_tokenizer(), 20, True)
    rows = [({"instruction": "Add.", "output": 3}, "is a int"), ({"instruction": " ", "output": "b"}, "is empty")]
    for row, why in [*rows, ({"instruction": "Add.", "output": "b"}, "no response within 20 tokens")]:
        bad = formatter.example(row, "instruction", "row 1")
        assert isinstance(bad, BadRow) and bad.where == "row 1" and why in bad.why


def test_a_template_that_refuses_a_chat_is_told() -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('only questions') }}"
    chat = {"messages": [{"role": "assistant", "content": "yes"}]}
    bad = Formatter(tokenizer, 100, True).example(chat, "chat", "row 1")
    assert isinstance(bad, BadRow) and "refuses it" in bad.why and "only questions" in bad.why
