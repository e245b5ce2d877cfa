"""Scores of an earlier run."""

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
from tests.models import tiny
from tests.oracle import discover


def test_scores_of_one_run_serve_any_ratio(tmp_path: Path) -> None:
    dense = discover(tiny("llama", num_hidden_layers=2))
    load_pass("l2")(dense)
    small = facts_of(dense)[Scores]
    small.save(tmp_path / "scores.safetensors")
    plans = {}
    for ratio in (0.1, 0.3):
        load_pass("select-by-ratio", ratio=ratio, protect=())(dense)
        plans[ratio] = facts_of(dense)[Removal].plan
    assert plans[0.1] != plans[0.3]
    for given in ({"scores": small}, {"file": tmp_path / "scores.safetensors"}):
        load_pass("load-scores", **given)(dense)
        load_pass("select-by-ratio", ratio=0.3, protect=())(dense)
        assert facts_of(dense)[Removal].plan == plans[0.3] and facts_of(dense)[Scores].source == "l2"


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
