"""Test that the demo tunes in smaller steps than the recipe and otherwise equals it."""

from __future__ import annotations

import pytest

from benchmarks.demo import in_small_steps
from fxprune.recipes import as_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_only_the_tuning_differs_from_the_recipe(name: str) -> None:
    for step, own in zip(as_recipe(name).passes, as_recipe(in_small_steps(name)).passes, strict=True):
        if own.name == "tune":
            assert vars(own) == {**vars(step), "batch": 2}
        else:
            assert str(own) == str(step)
