"""Training and held-out samples: formatted, packed, and split without overlap."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fxprune.data.calibration import IGNORED
from fxprune.data.rows import TEMPLATE, TEMPLATE_WITH_INPUT, BadRow, Row
from fxprune.errors import DataError
from fxprune.recovery.data import (
    Example,
    Formatter,
    TrainingData,
    collate,
    read_training_data,
)
from fxprune.recovery.settings import RecoverySettings, settings_from
from tests.tokens import character_tokenizer

SUMS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(40)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SETTINGS = RecoverySettings(held_out=5, max_tokens=400)
TOKENIZER = character_tokenizer()


def read(data: Any, **changes: Any) -> TrainingData:
    return read_training_data(data, TOKENIZER, settings_from(SETTINGS, changes))


def counted_text(example: Example) -> str:
    """The text of the tokens that count in the loss."""
    return TOKENIZER.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize("given", ["", "3"])
@pytest.mark.parametrize("response_only", [True, False])
def test_an_instruction_counts_its_response_and_the_end_or_whole(given: str, response_only: bool) -> None:
    row = {"instruction": "Add.", "input": given, "output": "Four"}
    example = Formatter(TOKENIZER, 1000, response_only).example(Row("row 1", "instruction", row))
    assert isinstance(example, Example) and not example.cut
    prompt = (TEMPLATE_WITH_INPUT if given else TEMPLATE).format(**row)
    assert TOKENIZER.decode(example.ids) == f"{prompt}Four</s>"
    assert counted_text(example) == ("Four</s>" if response_only else f"{prompt}Four</s>")


def test_chat_counts_every_answer_and_no_question() -> None:
    tokenizer = character_tokenizer(chat=True)
    turns = [("user", "2?"), ("assistant", "two"), ("user", "3?"), ("assistant", "three")]
    row = Row("row 1", "chat", {"messages": [{"role": role, "content": content} for role, content in turns]})
    example = Formatter(tokenizer, 200, response_only=True).example(row)
    assert isinstance(example, Example)
    assert tokenizer.decode(example.ids) == "<u>2?</s><a>two</s><u>3?</s><a>three</s>"
    assert counted_text(example) == "two</s>three</s>"
    tokenizer.chat_template = "{{ raise_exception('only questions') }}"
    bad = Formatter(tokenizer, 100, True).example(row)
    assert isinstance(bad, BadRow) and "refuses it" in bad.why and "only questions" in bad.why


def test_text_is_packed_into_windows_that_hold_all_of_it() -> None:
    texts = [{"text": f"{letter * 30}."} for letter in "abcdefghijkl"]
    data = read(texts, max_tokens=50, held_out=2)
    assert all(len(example.ids) == 50 for example in data.train[:-1])
    joined = TOKENIZER.decode([token for example in data.train for token in example.ids])
    kept = [row["text"] for row in texts if row["text"] in joined]
    assert len(kept) == 10 and joined == "".join(f"{text}</s>" for text in joined.split("</s>")[:-1])
    assert all(example.labels == example.ids for example in data.train)
    assert data.report.formats == {"text": 12}


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [*SUMS[:20], {"instruction": "no answer"}, {"instruction": "x", "output": "  "}, 7, {"messages": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, [*rows, SUMS[0]]), '{"instruction": broken', json.dumps(SUMS[21])]))
    data = read(path)
    found = {row.where: row.why for row in data.report.bad}
    assert found.keys() == {"line 21", "line 22", "line 23", "line 24", "line 26"}
    assert found["line 22"] == "'output' is empty" and found["line 26"].startswith("not JSON")
    assert "none of the known fields" in found["line 21"] and "instruction" in found["line 21"]
    assert data.report.rows == 27 and data.report.duplicates == 1
    assert data.report.train + data.report.held_out == 21
    notes = " ".join(data.report.notes())
    assert "5 of 27 rows left out" in notes and "line 22" in notes and "1 rows left out that repeat" in notes
    rows = [*SUMS, {"text": "plain"}]
    assert not read(rows).report.bad
    (bad,) = read(rows, data_format="instruction").report.bad
    assert bad.why == "no 'instruction'; its fields are ['text']"


def test_long_samples_are_cut_and_counted() -> None:
    rows = [*SUMS, {"instruction": "Go on.", "output": "on " * 200}, {"instruction": "word " * 100, "output": "yes"}]
    data = read(rows, max_tokens=250)
    assert [row.why for row in data.report.bad] == ["no response within 250 tokens"]
    assert data.report.cut == 1 and max(len(example.ids) for example in data.train + data.held_out) == 250
    assert data.report.notes()[1:] == ("1 samples cut at the longest length",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set is empty"),
        ([{"question": "a", "answer": "b"}] * 2, r"none of 2 rows .*its fields are \['answer', 'question'\]"),
        (SUMS[:1], "0 samples to train on and 1 held out"),
        ([{"instruction": "Add.", "output": 3}], "'output' is not text, but int"),
        ([CHAT], "none of 1 rows can be used: a chat, but the tokenizer has no chat template"),
    ],
)
def test_data_that_cannot_be_used_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(rows)


def test_parts_share_no_row_and_no_paragraph(tmp_path: Path) -> None:
    words = [f"Paragraph number {i} says {random.Random(i).random()}" for i in range(400)]
    repeated = "\n\n".join(words + words[:50])
    numbered = [{"id": i, **SUMS[i % 40]} for i in range(80)]
    data = read([repeated, *numbered], held_out=0.2)
    text = [TOKENIZER.decode([t for e in part for t in e.ids]) for part in (data.train, data.held_out)]
    marks = [word.split(" says ")[1] for word in words]
    assert not [mark for mark in marks if mark in text[0] and mark in text[1]]
    assert not {example.ids for example in data.train} & {example.ids for example in data.held_out}
    assert data.report.duplicates == 40, "rows that differ in a field that is not read give the same sample"
    path = tmp_path / "book.txt"
    path.write_text("\n \n".join(f"Line {i}. " + "word " * 60 for i in range(60)))  # no blank lines: split by lines
    data = read(path, max_tokens=100)
    parts = [{line for x in side for line in counted_text(x).split("\n")} for side in (data.train, data.held_out)]
    assert data.report.formats == {"text": 1} and data.report.held_out > 1 and len(data.train) > 1
    assert not {line for line in parts[0] & parts[1] if line.startswith("Line")}
    report = read(None, max_tokens=256, held_out=0.1).report
    assert report.train > 500 and report.held_out > 50, "the built-in text"


def test_the_split_depends_on_the_seed_alone() -> None:
    first, same, other = (read(SUMS, seed=seed) for seed in (0, 0, 1))
    assert first == same and first.report.digest != other.report.digest
    assert len(first.held_out) == 5 and len(read(SUMS, held_out=0.25).held_out) == 10


def test_a_batch_is_padded_at_its_end() -> None:
    batch = collate([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))], padding=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
