"""Files of questions, checked line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxprune.errors import EvaluationError
from fxprune.evaluation.tasks import LocalTask, read_questions
from tests.evaluation.samples import QUESTIONS, SCHEMAS, write


def test_questions_are_read_from_a_line_on_with_the_suffix_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", QUESTIONS[:3])
    rows = read_questions(LocalTask(path, suffix="\nAnswer:", start=1))
    assert [row["query"] for row in rows] == [f"{question['query']}\nAnswer:" for question in QUESTIONS[1:3]]
    assert read_questions(LocalTask(path))[0] == QUESTIONS[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a", "choices": ["b"], "gold": 0}', "{"], "1 of 2 lines .* line 2: not JSON"),
        (['{"query": "a", "choices": ["b", "c"], "gold": 2}'], "line 1: gold is 2 of 2 choices"),
        (['{"query": "a", "answers": ["b", "c"], "gold": 1}'], r"line 1: fields \['answers', 'gold', 'query'\]"),
        (['["a"]'], "line 1: a list, not an object"),
        ([json.dumps(QUESTIONS[0]), json.dumps(SCHEMAS[0])], "two kinds of question"),
        ([""], "no questions"),
    ],
)
def test_files_that_hold_no_questions_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match=message):
        read_questions(LocalTask(path))
