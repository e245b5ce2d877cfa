"""Recipes from the call to the slim model: what the default does, with and without data."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.recipes import read_recipe
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

SMALL = {
    r"^calibrate.*$": "calibrate{tokens=16, samples=24, written=24}",
    r"record-teacher.*$": "record-teacher{samples=16}",
    r"epochs=[12]": "epochs=4",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


def small(name: str) -> str:
    """An installed recipe with fewer and shorter samples."""
    text = str(read_recipe(name))
    for old, new in SMALL.items():
        text = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    return text


@pytest.mark.slow
def test_the_default_recipe_needs_a_tokenizer_alone(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxprune.prune(model, tokenizer=character_tokenizer(), recipe=small("balanced"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert abs(result.report.achieved - 0.2) < 0.005
    assert result.report.verification_error is not None and result.report.verification_error < 1e-4
    notes = "\n".join(result.report.notes)
    assert (
        "calibrated on 8 samples that the model generated, and 16 of built-in text" in notes
        and "passed as calibration, do better" in notes
    )
    assert "weights were fitted by least squares" in notes and "on built-in text of another kind" in notes
    assert {name.rpartition("/")[2] for name in result.report.widths} == {"mlp"}, "MLP channels go before heads"
    with torch.no_grad():
        ids = token_ids(2, 9)
        assert torch.allclose(result.graph_module(ids).logits, result.model(ids).logits, atol=1e-4)


def test_a_model_without_mlp_channels_loses_heads(model: PreTrainedModel) -> None:
    """The kinds that come first are no more than that."""
    result = fxprune.prune(model, token_ids(6, 12), recipe=small("balanced"), kinds="head", ratio=0.05)
    assert {name.rpartition("/")[2] for name in result.report.widths} == {"head"}


def test_an_importance_without_data_fits_nothing_and_with_data_what_the_recipe_fits(model: PreTrainedModel) -> None:
    plain = fxprune.prune(model, importance="l2")
    whole = model.state_dict()
    for name, value in plain.model.state_dict().items():
        kept = whole[name]
        for axis, units in plain.plan.kept.get(name, {}).items():
            kept = kept.index_select(axis, torch.tensor(units))
        assert torch.equal(value, kept)
    fitted = fxprune.prune(model, importance="l2", tokenizer=character_tokenizer(), recipe=small("fast"))
    found = [any("fitted" in note for note in result.report.notes) for result in (plain, fitted)]
    assert found == [False, True]
