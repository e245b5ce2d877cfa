"""Recipes and what a call says otherwise: the passes that come of both."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.api import prune_pipeline
from fxprune.recipes.compose import Wishes, compose
from fxprune.recipes.recipe import read_recipe
from tests.models import token_ids

IDS = token_ids(4, 12)


def lines(**options: Any) -> list[str]:
    return str(prune_pipeline(**options)).splitlines()


def names(**options: Any) -> list[str]:
    return [step.name for step in prune_pipeline(**options).passes]


@pytest.mark.parametrize("name", ["fast", "balanced", "best", "llm-pruner"])
def test_a_recipe_runs_as_it_is_printed(name: str) -> None:
    assert lines(calibration=IDS, recipe=name) == [str(step) for step in read_recipe(name).passes]


def test_nothing_said_leaves_the_recipe_but_for_samples_that_there_are_not() -> None:
    recipe = read_recipe("balanced")
    assert [str(step) for step in compose(recipe, Wishes())] == [str(step) for step in recipe.passes][1:]
    bare = compose(recipe, Wishes(without_data=True, verify=False))
    assert not {step.stage for step in bare} & {"compensate", "tune", "verify"}


def test_the_default_is_balanced_and_a_named_importance_stands_alone() -> None:
    assert lines(calibration=IDS) == lines(calibration=IDS, recipe="balanced")
    assert lines(calibration=IDS, importance="taylor") == lines(calibration=IDS, recipe="llm-pruner")
    assert "least-squares" not in names(calibration=IDS, taylor="first")
    assert "tune" in names(calibration=IDS, taylor="first", recipe="balanced")


def test_no_data_asked_no_data_used() -> None:
    """An importance that needs no samples, and a tokenizer at hand: nothing is calibrated, fitted or tuned."""
    plain = names(importance="l2")
    assert plain[:3] == ["find-groups", "l2", "select-by-ratio"]
    assert not {"calibrate", "least-squares", "record-teacher", "tune"} & set(plain)
    assert names(importance="l2", tokenizer=len) == plain
    for recipe in ("balanced", "best"):
        assert names(importance="l2", recipe=recipe, tokenizer=len) == plain
    assert "least-squares" in names(importance="l2", recipe="balanced", calibration=IDS)
    asked = names(importance="l2", tokenizer=len, compensate="least-squares")
    assert asked[0] == "calibrate" and "least-squares" in asked
    assert "calibrate" not in names(importance="l2", compensate="least-squares"), "the fit says what it needs"


def test_a_tokenizer_stands_in_for_samples() -> None:
    pipeline = prune_pipeline(tokenizer=len)
    assert pipeline.passes[0].name == "calibrate" and pipeline.passes[0].tokenizer is len  # type: ignore[attr-defined]
    teacher = next(step for step in pipeline.passes if step.name == "record-teacher")
    assert teacher.tokenizer is len  # type: ignore[attr-defined]


def test_arguments_win_over_the_recipe() -> None:
    found = lines(calibration=IDS, kinds="head", ratio=0.3, protect=(1, 1), seed=7, reduction="max")
    assert any(line.startswith("wanda{kinds=[head], reduction=max, ") for line in found)
    assert any("kinds=[head]" in line and "protect=[1, 1]" in line and "ratio=0.3" in line for line in found)
    assert "make-verification-inputs{seed=7}" in found and any("tune{" in line and "seed=7" in line for line in found)
    shared = "calibrate, find-groups, l1, select-by-ratio{ratio=0.4, protect=[1, 0]}, shrink"
    assert lines(recipe=shared, calibration=IDS)[2:4] == ["l1", "select-by-ratio{protect=[1, 0], ratio=0.4}"]
    assert (
        lines(recipe=shared, calibration=IDS, uniform=True)[3] == "select-by-ratio{protect=[], uniform=True, ratio=0.4}"
    )
    assert lines(recipe=shared, group_ratio=0.5)[2].startswith("select-by-group-ratio{protect=[1, 0], group_ratio=0.5")


def test_stages_are_replaced_left_out_and_put_in_where_their_turn_is() -> None:
    balanced = names(calibration=IDS)
    without = names(calibration=IDS, compensate="none", tune="none")
    assert [name for name in balanced if name not in ("least-squares", "record-teacher", "tune")] == without
    other = names(calibration=IDS, compensate="rotation")
    assert other == [{"least-squares": "rotation"}.get(name, name) for name in balanced]
    longer = lines(calibration=IDS, tune="tune{epochs=9}")
    assert "tune{epochs=9.0}" in longer and len(longer) == len(balanced)
    put_in = names(calibration=IDS, taylor="mix", compensate="least-squares", tune="tune")
    order = [put_in.index(name) for name in ("select-by-ratio", "record-teacher", "least-squares", "shrink", "tune")]
    assert order == sorted(order) and put_in.index("tune") < put_in.index("emit-model")
    assert "verify-removal" not in names(calibration=IDS, verify=False)


def test_samples_come_from_where_the_call_says(tmp_path: Any) -> None:
    own = "calibrate{file='rows.jsonl', samples=3}, find-groups, taylor, select-by-ratio, least-squares, shrink"
    assert lines(recipe=own)[0] == "calibrate{file=rows.jsonl, samples=3}"
    assert lines(recipe=own, tokenizer=len)[0] == "calibrate{file=rows.jsonl, samples=3}"
    assert "least-squares" in names(recipe=own, importance="l2")
    given = prune_pipeline(IDS, recipe=own).passes[0]
    assert given.data is IDS and str(given) == "calibrate{samples=3}"  # type: ignore[attr-defined]
    assert names(recipe="find-groups, taylor, select-by-ratio", calibration=IDS)[0] == "calibrate"
