"""Greedy answers and their comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fxprune.errors import EvaluationError
from fxprune.evaluation.comparison import Reference, evaluate
from fxprune.evaluation.generation import Answers, answer_questions, compare_answers, plain_questions, word_overlap
from tests.evaluation.samples import TEXT, TOKENIZER
from tests.models import tiny


def answers(*rows: tuple[int, ...]) -> Answers:
    return Answers(tuple(map(str, range(len(rows)))), tuple(" ".join(map(str, row)) for row in rows), rows)


def test_there_are_sixty_questions() -> None:
    assert len(set(plain_questions())) == 60 and all(q.endswith(("?", ".")) for q in plain_questions())


def test_words_overlap_as_often_as_they_occur() -> None:
    assert word_overlap("a a b", "a b c d") == pytest.approx(2 * 2 / 7)
    assert word_overlap("", "") == 1 and word_overlap("", "a") == 0 and word_overlap("The cat", "the CAT") == 1


def test_measures_of_answers_are_those_by_hand() -> None:
    """Five 4-grams of which two repeat; four of five tokens, an end included, before the first difference."""
    found = compare_answers(answers((1, 2, 3, 4, 1, 2, 3, 4), (5, 6, 7)), answers((1, 2, 3, 4), (5, 6, 7)))
    assert found.repetition == pytest.approx((1 / 5) / 2) and found.repetition_error == pytest.approx(0.1)
    assert found.distinct_1 == pytest.approx(7 / 11) and found.distinct_2 == pytest.approx(6 / 9)
    assert found.same_start == pytest.approx((4 / 5 + 1) / 2) and found.same == 0.5
    assert found.overlap == pytest.approx((2 * 4 / 12 + 1) / 2)
    assert compare_answers(answers((1, 2))).overlap is None
    with pytest.raises(EvaluationError, match="other questions"):
        compare_answers(answers((1,)), answers((1,), (2,)))


def test_answers_are_those_of_one_question_at_a_time(model: PreTrainedModel) -> None:
    """Padding on the left changes nothing, and the model's mode and settings are its own again."""
    questions = ["How many?", "Is it a long way to the sea from here?", "No."]
    model.train()
    own = model.generation_config
    together = answer_questions(model, TOKENIZER, questions, tokens=6)
    assert model.training and model.generation_config is own
    model.eval()
    for question, ids in zip(questions, together.ids, strict=True):
        row = torch.tensor([TOKENIZER(f"Question: {question}\nAnswer:")["input_ids"]])
        for token in ids:
            assert int(model(row).logits[0, -1].argmax()) == token
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
    with pytest.raises(EvaluationError, match="list of texts"):
        answer_questions(model, TOKENIZER, [])
    with pytest.raises(EvaluationError, match="generates no text"):
        answer_questions(model.model, TOKENIZER)


def test_a_model_agrees_with_itself_and_less_with_another(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.evaluation.generation.plain_questions", lambda: ["How many?", "Where?"])
    options: dict[str, Any] = {"texts": {"text": TEXT}, "window": 16, "generate": True}
    own = evaluate(model, TOKENIZER, reference=model, **options)
    assert own.generation is not None and own.generation.same == own.generation.overlap == 1
    other = evaluate(tiny("llama", num_hidden_layers=1), TOKENIZER, reference=Reference(model), **options)
    assert other.generation is not None and other.generation.same_start is not None
    assert other.generation.same_start < 1
    assert other.to_dict()["answers"].keys() == {"How many?", "Where?"}
