"""Recipes: whole prunes as text, and the options that change them.

Recipes are imported when they are first used, so that the declaration of options needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.recipes.options import ApplyOptions, Options, option_table, resolve
from fxprune.recipes.texts import recipe_names

if TYPE_CHECKING:
    from fxprune.recipes.recipe import Recipe, as_recipe, read_recipe

__all__ = ["ApplyOptions", "Options", "Recipe", "as_recipe", "option_table", "read_recipe", "recipe_names", "resolve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fxprune.recipes import recipe

    return getattr(recipe, name)
