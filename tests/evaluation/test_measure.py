"""Texts and tasks of one model, measured in one call that leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation.comparison import Evaluation
from fxprune.evaluation.perplexity import CORPORA
from fxprune.evaluation.tasks import TaskScore, zero_shot
from fxprune.masking.parts import InBlocks, parts_by_weights
from tests.evaluation.samples import QUESTIONS, TEXT, TOKENIZER, write
from tests.models import tiny, token_ids
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_that_go_through_a_part_of_the_model_after_the_other_are_worth_the_same(family: str) -> None:
    model = tiny(family, num_hidden_layers=3)
    steps: list[str] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for done, item in enumerate(items, start=1):
            steps.append(f"{done} of {total}")
            yield item

    texts, sizes = {"a": TEXT, "b": TEXT[:90]}, {"window": 40, "batch": 2}
    whole = fxprune.evaluate(model, TOKENIZER, texts=texts, **sizes)
    parts = fxprune.evaluate(model, TOKENIZER, texts=texts, **sizes, memory="low", track=track)
    for name, found in whole.perplexities.items():
        assert parts.perplexities[name].value == pytest.approx(found.value, rel=1e-5)
        assert parts.perplexities[name].windows == found.windows
    batches = -(-whole.perplexities["a"].windows // 2)
    count = len(parts_by_weights(fxprune.trace(model).graph_module)) * batches
    assert count > batches and f"{count} of {count}" in steps


def test_a_graph_is_measured_a_part_after_the_other_too(model: PreTrainedModel) -> None:
    graph_module = fxprune.trace(model).graph_module
    found = fxprune.evaluate(graph_module, TOKENIZER, texts={"a": TEXT}, window=40, memory="low")
    whole = fxprune.evaluate(model, TOKENIZER, texts={"a": TEXT}, window=40)
    assert found.perplexities["a"].value == pytest.approx(whole.perplexities["a"].value, rel=1e-5)
    assert InBlocks(model)(token_ids(2)).logits.shape[:2] == token_ids(2).shape


def test_parts_are_refused_where_the_graph_takes_more_than_token_ids(model: PreTrainedModel) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    graph_module = fxprune.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).graph_module
    with pytest.raises(EvaluationError, match="takes input_ids, attention_mask"):
        fxprune.evaluate(graph_module, TOKENIZER, texts={"a": TEXT}, window=40, memory="low")
    with pytest.raises(UnknownNameError, match="'lo'"):
        fxprune.evaluate(model, TOKENIZER, texts={"a": TEXT}, window=40, memory="lo")


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
