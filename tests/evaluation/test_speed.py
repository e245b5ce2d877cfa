"""How models are timed; never how fast they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import generic

import fxprune
from fxprune.errors import EvaluationError
from fxprune.evaluation.speed import measure_speed


def test_models_generate_as_many_tokens_and_keep_as_many_keys(model: PreTrainedModel) -> None:
    slim = fxprune.prune(model, importance="l2", kinds="head", ratio=0.05, protect=()).model
    seen: list[tuple[str, int]] = []

    def track(items: Any, what: str, total: int) -> Any:
        seen.append((what, total))
        return items

    found = measure_speed({"dense": model, "slim": slim}, prompt=7, tokens=4, batch=2, rounds=2, track=track)
    assert seen == [("generating", 3)] and list(found) == ["dense", "slim"]
    dense, less = found["dense"], found["slim"]
    assert (dense.batch, dense.prompt, dense.tokens, dense.peak) == (2, 7, 4, None)
    heads, layers, width = model.config.num_key_value_heads, model.config.num_hidden_layers, 8
    assert dense.cache == 2 * layers * 2 * heads * (7 + 4 - 1) * width * 4, "keys and values of all but the last token"
    assert less.cache is not None and less.cache < 2 * layers * 2 * heads * (7 + 4 - 1) * width * 4
    assert less.weights < dense.weights
    assert dense.prefill_rate == pytest.approx(2 * 7 / dense.prefill_ms * 1e3)
    assert dense.to_dict()["decode_rate"] == pytest.approx(2 / dense.decode_ms * 1e3)


def test_nothing_is_asked_for_by_an_old_name(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a bar of progress `fxprune bench` printed that `past_key_values` is deprecated."""
    warned: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", warned.append)
    assert measure_speed({"dense": model}, prompt=3, tokens=2, rounds=1)["dense"].cache
    assert [words for words in warned if "past_key_values" in words] == []


def test_a_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    model.generation_config.do_sample = True
    before = torch.get_rng_state()
    try:
        measure_speed({"dense": model}, prompt=3, tokens=2, rounds=1)
        assert model.generation_config.do_sample
    finally:
        model.generation_config.do_sample = False
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn"


@pytest.mark.parametrize(
    ("options", "says"),
    [({"tokens": 1}, "tokens is 1"), ({"prompt": 0}, "prompt is 0"), ({"prompt": 999}, "the model takes 256")],
)
def test_what_cannot_be_timed_is_refused(model: PreTrainedModel, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        measure_speed({"dense": model}, **options)
    with pytest.raises(EvaluationError, match="models by name"):
        measure_speed({}, **options)
    with pytest.raises(EvaluationError, match="a Hugging Face model"):
        measure_speed({"dense": torch.nn.Linear(1, 1)})
