"""Recipes as text: what is installed, what it says of itself, and how one of your own is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.pipeline.pipeline import Pipeline
from fxprune.recipes.recipe import Recipe, as_recipe, read_recipe, recipe_names


def test_the_installed_recipes_say_what_they_do_and_cost() -> None:
    assert recipe_names() == ("fast", "balanced", "best", "llm-pruner")
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.name == name and len(recipe.summary) > 40 and len(recipe.costs) > 40
        names = [step.name for step in recipe.passes]
        assert names[0] == "calibrate" and names[-1] == "make-report" and "verify-removal" in names
        assert [str(step) for step in Pipeline(str(recipe)).passes] == [str(step) for step in recipe.passes]


def test_forward_passes_are_enough_for_the_fast_one() -> None:
    names = {step.name for step in read_recipe("fast").passes}
    assert not names & {"taylor", "tune", "gates", "fisher"}


def test_a_recipe_of_ones_own_is_a_file_or_a_text(tmp_path: Path) -> None:
    text = "# Mine, for\n# a test.\n# Costs: nothing.\nfind-groups\n(l2{kinds=[mlp]}, select-by-ratio)\n"
    path = tmp_path / "mine.txt"
    path.write_text(text)
    for value in (path, str(path)):
        recipe = as_recipe(value)
        assert (recipe.name, recipe.summary, recipe.costs) == ("mine", "Mine, for a test.", "nothing.")
        assert [str(step) for step in recipe.passes] == ["find-groups", "l2{kinds=[mlp]}", "select-by-ratio"]
    assert as_recipe(recipe) is recipe
    assert as_recipe("find-groups, l2") == Recipe("", "find-groups, l2") and not as_recipe("find-groups, l2").costs
    assert as_recipe("fast") == read_recipe("fast")


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'balance'. Did you mean 'balanced'"):
        as_recipe("balance")
    with pytest.raises(FxpruneError, match=r"cannot be read.*Pass the name of a recipe"):
        as_recipe(tmp_path / "none.txt")
    with pytest.raises(FxpruneError, match="recipe is 3"):
        as_recipe(3)
