"""The face: options that cannot work are refused before anything is traced; see end_to_end for what it does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fxprune.api import apply, prune, prune_pipeline
from fxprune.errors import FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.contract import STAGES
from fxprune.pipeline.registry import load_pass, parse_pass
from fxprune.removal.plan import Plan
from tests.models import token_ids


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"importance": "tailor"}, UnknownNameError, "unknown importance 'tailor'.*Did you mean 'taylor'"),
        ({"importance": "least-squares"}, UnknownNameError, "unknown importance 'least-squares'"),
        ({"compensate": "least-cubes"}, UnknownNameError, "unknown compensation"),
        ({"select": "shrink"}, UnknownNameError, "unknown selection"),
        ({"importance": "taylor{ordre=mix}"}, UnknownNameError, "Did you mean 'order'"),
        ({"importance": "taylor{order=mix"}, PassError, "no closing brace"),
        ({"taylor": "thrid"}, UnknownNameError, "taylor order"),
        ({"taylor": "first", "importance": "l2"}, FxpruneError, "Leave one of them out"),
        ({"taylor": "first", "importance": "taylor{order=second}"}, FxpruneError, "Leave one of them out"),
        ({"kinds": ("heads",)}, UnknownNameError, "Did you mean 'head'"),
        ({"kinds": ()}, FxpruneError, "kinds is empty"),
        ({"ratio": 1.0}, FxpruneError, r"\[0, 1\)"),
        ({"budget": "parms"}, UnknownNameError, "Did you mean 'params'"),
        ({"budget": "bytes@q8"}, UnknownNameError, "Did you mean 'q8_"),
        ({"steps": 0, "importance": "l2"}, FxpruneError, "of 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for call in (prune_pipeline, lambda **given: prune(None, **given)):  # type: ignore[arg-type]
        with pytest.raises(error, match=text):
            call(**options)


def test_every_option_of_prune_is_one_of_the_pipeline() -> None:
    own = set(inspect.signature(prune).parameters) - {"model", "example_inputs", "device"}  # what runs, and where
    assert own == set(inspect.signature(prune_pipeline).parameters) - {"plan"}
    assert set(inspect.signature(apply).parameters) >= {"plan", "compensate", "tune", "track", "verify", "inplace"}


def test_a_plan_takes_the_place_of_scores_and_selection() -> None:
    names = [step.name for step in prune_pipeline(plan=Plan()).passes]
    assert names[:2] == ["find-groups", "plan-from-json"] and "taylor" not in names


def test_passes_are_taken_as_they_are() -> None:
    mine = load_pass("l1", kinds=("channel",))
    assert prune_pipeline(importance=mine, verify=False).passes[1] is mine
    assert not {"record-expected", "verify-removal"} & {step.name for step in prune_pipeline(verify=False).passes}


def test_steps_and_budgets_are_spelled() -> None:
    pipeline = prune_pipeline(token_ids(), recipe="fast", steps=3, budget="bytes@q8_0", compensate="least-squares")
    scoring, selecting = (next(step for step in pipeline.passes if step.stage == stage) for stage in STAGES[2:4])
    assert scoring.name == "score-in-steps" and scoring.steps == 3  # type: ignore[attr-defined]
    assert scoring.select == str(selecting) and "budget='bytes@q8_0'" in str(selecting)  # type: ignore[attr-defined]
    assert scoring.compensate.startswith("least-squares")  # type: ignore[attr-defined]
    assert str(parse_pass(str(scoring))) == str(scoring)
    assert [step.name for step in prune_pipeline(plan=Plan(), steps=2).passes][1] == "plan-from-json"
