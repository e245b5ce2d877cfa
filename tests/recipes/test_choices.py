"""Choices for stages: what a spelling stands for, and which importance needs no samples."""

from __future__ import annotations

import pytest

from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.pipeline.registry import load_pass
from fxprune.recipes.choices import needs_no_data, stage_passes, unless, with_order


def test_which_importance_needs_no_samples() -> None:
    assert needs_no_data("l2") and needs_no_data("random{seed=3}") and needs_no_data(load_pass("l1"))
    for value in ("taylor", "wanda", load_pass("taylor"), "tailor", "shrink", None, 3):
        assert not needs_no_data(value)


def test_a_spelling_wins_over_options_and_these_over_what_was_there() -> None:
    options, old = {"kinds": ("head",), "reduction": "max"}, {"kinds": ("layer",), "samples": 3}
    (made,) = stage_passes("taylor{kinds=[mlp]}", "importance", options, "", old)
    assert str(made) == "taylor{kinds=[mlp], reduction=max, samples=3}"
    (made,) = stage_passes("taylor", "importance", {}, "", old)
    assert str(made) == "taylor{kinds=[layer], samples=3}"
    mine = load_pass("l1")
    assert stage_passes(mine, "importance", options, "", old) == (mine,)


def test_none_leaves_out_what_may_be_left_out() -> None:
    assert stage_passes("none", "compensate", {}, "", {}) == stage_passes("none", "tune", {}, "", {}) == ()
    with pytest.raises(UnknownNameError, match="unknown importance 'none'"):
        stage_passes("none", "importance", {}, "", {})
    teacher, tune = stage_passes("tune{epochs=3}", "tune", {"seed": 5}, "record-teacher", {})
    assert (teacher.name, str(tune)) == ("record-teacher", "tune{epochs=3.0, seed=5}")


def test_what_is_of_another_stage_is_refused() -> None:
    with pytest.raises(ArgumentError, match="importance is the pass shrink, of the stage 'shrink'"):
        stage_passes(load_pass("shrink"), "importance", {}, "", {})


def test_an_order_is_one_of_its_own_importance() -> None:
    assert with_order("taylor", None, "first") == with_order("taylor", "taylor", "first") == "taylor{order=first}"
    assert with_order("taylor", "l2", None) == "l2"
    with pytest.raises(FxpruneError, match="Leave one of them out"):
        with_order("taylor", "l2", "first")


def test_a_default_is_not_said() -> None:
    assert unless("round_to", 1, 1) == {} and unless("round_to", None, 1) == {"round_to": None}
    assert unless("round_to", True, 1) == {"round_to": True}
