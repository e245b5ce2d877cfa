"""Texts and tasks of one model, measured in one call that leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation.corpora import CORPORA
from fxprune.evaluation.measure import Evaluation
from fxprune.evaluation.zeroshot import TaskScore, zero_shot
from tests.evaluation.samples import QUESTIONS, TEXT, TOKENIZER, write
from tests.models import token_ids
from tests.tokens import character_tokenizer


def test_texts_are_files_known_names_or_text_itself(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(**options: Any) -> Any:
        asked.append(options)
        return {"text": [TEXT, TEXT], "sentence": [TEXT]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (tmp_path / "note.txt").write_text(TEXT)
    found = fxprune.evaluate(model, TOKENIZER, texts=["wikitext2", "ptb", tmp_path / "note.txt"], window=40)
    named = fxprune.evaluate(model, TOKENIZER, texts={"mine": TEXT}, window=40)
    assert list(found.perplexities) == ["wikitext2", "ptb", "note"] and list(named.perplexities) == ["mine"]
    assert found.perplexities["note"] == named.perplexities["mine"] == found.perplexities["ptb"]
    assert [(o["path"], o["split"]) for o in asked] == [(CORPORA[n]["path"], CORPORA[n]["split"]) for n in CORPORA]
    with pytest.raises(UnknownNameError, match="'wikitext2'"):
        fxprune.evaluate(model, TOKENIZER, texts="wikitext")
    with pytest.raises(EvaluationError, match="no texts and no tasks"):
        fxprune.evaluate(model, TOKENIZER, texts=())


def test_a_graph_is_measured_on_texts_and_refused_on_tasks(model: PreTrainedModel, tmp_path: Path) -> None:
    result = fxprune.prune(model, None, importance="l2", protect=())
    of_graph = fxprune.evaluate(result.graph_module, TOKENIZER, texts={"a": TEXT}, window=40)
    of_result = fxprune.evaluate(result, TOKENIZER, texts={"a": TEXT}, window=40)
    assert of_graph.perplexities["a"].value == pytest.approx(of_result.perplexities["a"].value, rel=1e-4)
    with pytest.raises(EvaluationError, match="tasks need a Hugging Face model, not a"):
        zero_shot(result.graph_module, TOKENIZER, write(tmp_path / "q.jsonl", QUESTIONS))


def test_measuring_leaves_model_tokenizer_and_random_numbers_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    slim = fxprune.prune(model, None, importance="l2", protect=())
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    slim.model.train()
    before, state = list(slim.model.parameters()), torch.get_rng_state()
    first = fxprune.evaluate(slim, tokenizer, texts=(), tasks=path, questions=4)
    assert slim.model.training and tokenizer.pad_token is None
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(before, slim.model.parameters(), strict=True))
    assert first.tasks["even"].samples == 4
    assert slim.model.eval()(token_ids()).logits.allclose(slim(token_ids()).logits, atol=1e-5)


def test_the_average_is_over_tasks_and_answers_stay_out_of_the_numbers() -> None:
    scores = {"a": TaskScore("acc", 0.25, 0.1, 2, correct=(0.0, 0.5)), "b": TaskScore("acc", 0.75, 0.1, 1)}
    found = Evaluation(tasks=scores)
    assert found.average == 0.5
    assert Evaluation().average is None
    assert "correct" not in found.to_dict()["tasks"]["a"]
