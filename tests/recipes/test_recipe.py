"""Recipes: text with slots, of which each can be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.contract import STAGES
from fxprune.pipeline.registry import load_pass
from fxprune.recipes.recipe import Recipe, as_recipe, made_for, read_recipe
from tests.models import tiny


def test_replacing_a_stage_is_an_assignment() -> None:
    recipe = read_recipe("balanced")
    recipe["importance"] = "taylor{order=second}"
    recipe["tune"] = None
    del recipe["teach"]
    recipe["compensate"] = load_pass("rotation")
    expected = "calibrate{written=384, added=192, programs=0.125}\nfind-groups{norm=masked}\ntaylor{order=second}\n"
    expected += "select-by-ratio{ranking=auto, protect=[0.07, 0.04], first=[mlp]}\nrotation\nshrink{verify}\n"
    expected += "emit-model\nmake-report"
    assert str(recipe) == str(recipe.pipeline) == expected
    assert "wanda" in str(read_recipe("balanced")), "the installed one stays as it is"
    with pytest.raises(UnknownNameError, match=r"unknown stage 'import'.*Did you mean 'importance'"):
        recipe["import"] = "taylor"
    recipe["compensate"] = ["least-squares{samples=3}", load_pass("rotation")]  # refused, with advice to pass several
    assert [str(step) for step in recipe["compensate"]] == ["least-squares{samples=3}", "rotation"]
    with pytest.raises(ArgumentError, match="compensate is the pass l2, of the stage 'importance'"):
        recipe["compensate"] = ["rotation", load_pass("l2")]
    with pytest.raises(ArgumentError, match="compensate is 3"):
        recipe["compensate"] = [3]
    assert len(recipe["compensate"]) == 2


def test_a_recipe_is_a_file_or_a_text(tmp_path: Path) -> None:
    text = "# Mine, for\n# a test.\n# Costs: nothing.\nfind-groups\n(l2{kinds=[mlp]}, select-by-ratio)\n"
    path = tmp_path / "mine.txt"
    path.write_text(text)
    for value in (path, str(path)):
        recipe = as_recipe(value)
        assert (recipe.name, recipe.summary, recipe.costs) == ("mine", "Mine, for a test.", "nothing.")
        assert [str(step) for step in recipe.passes] == ["find-groups", "l2{kinds=[mlp]}", "select-by-ratio"]
        assert str(recipe) == text
    copy = as_recipe(recipe)
    copy["importance"] = "l1"
    assert recipe["importance"][0].name == "l2"
    assert str(as_recipe("find-groups, l2")) == "find-groups, l2" and not as_recipe("find-groups, l2").costs
    assert list(recipe) == list(STAGES) and len(recipe) == len(STAGES)


def test_invalid_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'balance'. Did you mean 'balanced'"):
        as_recipe("balance")
    with pytest.raises(FxpruneError, match=r"cannot be read.*Pass the name of a recipe"):
        as_recipe(tmp_path / "none.txt")
    with pytest.raises(FxpruneError, match="recipe is 3"):
        as_recipe(3)
    with pytest.raises(PassError, match=r"pass l2: stands behind select-by-ratio.*Order the passes by stage"):
        Recipe("mine", "find-groups, select-by-ratio, l2")


def test_a_spelling_wins_over_arguments_and_these_over_the_replaced_pass() -> None:
    recipe = Recipe("", "find-groups, taylor{kinds=[layer], samples=3}, select-by-ratio")
    recipe.replace_stage("importance", "taylor{kinds=[mlp]}", {"kinds": ("head",), "reduction": "max"})
    assert str(recipe["importance"][0]) == "taylor{kinds=[mlp], reduction=max, samples=3}"
    mine = load_pass("l1")
    recipe.replace_stage("importance", mine, {"reduction": "max"})
    assert recipe["importance"] == (mine,)


def test_a_combinator_runs_the_pass_whose_place_it_takes() -> None:
    recipe = Recipe("", "find-groups, taylor{order=second}, select-by-ratio")
    recipe.replace_stage("importance", "score-in-steps{steps=3}", {})
    recipe.set_arguments("importance", {"reduction": "max"})
    assert str(recipe["importance"][0]) == "score-in-steps{importance=taylor{reduction=max, order=second}, steps=3}"


def test_a_prune_makes_a_report_though_its_recipe_leaves_it_out() -> None:
    """It was missed after all the work."""
    result = fxprune.prune(tiny("llama"), recipe="find-groups\nl2\nselect-by-ratio\nshrink", protect=(), ratio=0.2)
    assert result.report.achieved == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ArgumentError, match=r"importance is 5.*a pass, its spelling, several of these, or None"):
        read_recipe("balanced")["importance"] = 5  # type: ignore[assignment]


def test_only_optional_stages_can_be_left_out() -> None:
    assert made_for("compensate", "none") is made_for("tune", None) is None
    with pytest.raises(UnknownNameError, match="unknown importance 'none'"):
        made_for("importance", "none")
    with pytest.raises(ArgumentError, match="importance is the pass shrink, of the stage 'shrink'"):
        made_for("importance", load_pass("shrink"))
