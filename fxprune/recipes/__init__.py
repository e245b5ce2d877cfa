"""Recipes: whole prunes as text, and what becomes of one where arguments say otherwise."""

from fxprune.recipes.compose import Making, Wishes, compose, selects_by_samples
from fxprune.recipes.options import Options
from fxprune.recipes.recipe import Recipe, as_recipe, read_recipe, recipe_names

__all__ = [
    "Making",
    "Options",
    "Recipe",
    "Wishes",
    "as_recipe",
    "compose",
    "read_recipe",
    "recipe_names",
    "selects_by_samples",
]
