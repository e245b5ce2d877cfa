"""Tests: criteria that need no data: magnitudes, random numbers, scores of an earlier run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fxprune
from fxprune.errors import PlanError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores
from tests.models import tiny, token_ids
from tests.oracle import discover


def test_scores_of_one_run_serve_any_ratio(tmp_path: Path) -> None:
    model, ids = tiny("llama", num_hidden_layers=2), token_ids(2)
    small = fxprune.prune(model, ids, taylor="mix", ratio=0.1, protect=(), verify=False)
    assert small.scores is not None and small.scores.source.startswith("taylor")
    small.scores.save(tmp_path / "scores.safetensors")
    large = fxprune.prune(model, ids, taylor="mix", ratio=0.3, protect=(), verify=False)
    for kept in (small.scores, tmp_path / "scores.safetensors"):
        again = fxprune.prune(model, recipe="llm-pruner", scores=kept, ratio=0.3, protect=(), verify=False)
        assert again.plan == large.plan != small.plan
        assert again.scores is not None and again.scores.source.startswith("taylor")
    assert fxprune.apply(model, large.plan, verify=False).scores is None


def test_what_is_no_scores_of_the_model_is_refused(tmp_path: Path) -> None:
    dense = discover(tiny("llama", num_hidden_layers=1))
    load_pass("l2")(dense)
    kept = facts_of(dense)[Scores]
    load_pass("load-scores", scores=kept)(dense)
    load_pass("select-by-ratio", protect=())(dense)
    assert facts_of(dense)[Removal].scores is kept
    name = next(iter(kept.units))
    with pytest.raises(PlanError, match="Use scores of this model"):
        load_pass("load-scores", scores=Scores({name: np.ones(5)}))(dense)
    for arguments in ({}, {"scores": "l2"}, {"file": str(tmp_path / "none")}):
        with pytest.raises(PlanError):
            fxprune.Pipeline([load_pass("load-scores", **arguments)])(dense)
