"""Tasks are scored by the harness as by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation.tasks import PAPER_TASKS, LocalTask, check_tasks, named_tasks, zero_shot
from tests.evaluation.samples import QUESTIONS, SCHEMAS, TOKENIZER, write


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Of a continuation, one token after the other."""
    start, ids = len(TOKENIZER(context)["input_ids"]), TOKENIZER(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_local_questions_are_scored_as_by_hand(model: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    score = zero_shot(model, TOKENIZER, {"even": LocalTask(path, suffix="\nAnswer:")})["even"]
    right = []
    for question in QUESTIONS:
        context = f"{question['query']}\nAnswer:"
        sums = [log_likelihood(model, context, f" {choice}") for choice in question["choices"]]
        lengths = [len(choice) for choice in question["choices"]]
        normed = [total / length for total, length in zip(sums, lengths, strict=True)]
        plain, by_length = sums.index(max(sums)), normed.index(max(normed))
        right.append((plain == question["gold"], by_length == question["gold"]))
    assert score.metric == "acc_norm" and score.samples == len(QUESTIONS)
    assert score.correct == tuple(float(norm) for _, norm in right)
    assert score.chance == pytest.approx(sum(1 / len(q["choices"]) for q in QUESTIONS) / len(QUESTIONS))
    assert score.value == pytest.approx(sum(score.correct) / len(right))
    assert score.others["acc"] == pytest.approx(sum(plain for plain, _ in right) / len(right))
    p, n = score.value, score.samples
    assert score.standard_error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5, rel=1e-4)


def test_questions_by_context_are_scored_as_by_hand(model: PreTrainedModel, tmp_path: Path) -> None:
    score = zero_shot(model, TOKENIZER, write(tmp_path / "schema.jsonl", SCHEMAS))["schema"]
    best = [
        max((0, 1), key=lambda i, row=row: log_likelihood(model, row["context_options"][i], f" {row['continuation']}"))
        for row in SCHEMAS
    ]
    assert score.metric == "acc" and score.chance == 0.5
    assert score.correct == tuple(float(b == row["gold"]) for b, row in zip(best, SCHEMAS, strict=True))


def test_tasks_are_named_by_the_harness_or_by_their_file() -> None:
    assert list(named_tasks(PAPER_TASKS)) == list(PAPER_TASKS) and len(PAPER_TASKS) == 7
    assert list(named_tasks(["boolq", "a/quiz.jsonl", LocalTask("b/test.jsonl")])) == ["boolq", "quiz", "test"]


def test_a_task_that_nobody_knows_is_told(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match=r"no_such_task.*jsonl"):
        zero_shot(model, TOKENIZER, "no_such_task")


def test_tasks_are_checked_before_a_model_is_asked(tmp_path: Path) -> None:
    check_tasks(["boolq", write(tmp_path / "even.jsonl", QUESTIONS)])
    check_tasks(())
    with pytest.raises(UnknownNameError, match="Did you mean 'boolq'"):
        check_tasks(["piqa", "bolq"])
    with pytest.raises(EvaluationError, match="lines cannot be used"):
        check_tasks(LocalTask(write(tmp_path / "odd.jsonl", [{"a": 1}])))
