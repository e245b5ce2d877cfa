"""Texts of the installed recipes, read without torch."""

from __future__ import annotations

from importlib.resources import files
from itertools import takewhile

from fxprune.errors import UnknownNameError

SUFFIX = ".txt"


def recipe_names() -> tuple[str, ...]:
    """Names of the installed recipes, from little work to much, and the published one last."""
    return ("fast", "balanced", "best", "llm-pruner")


def recipe_text(name: str) -> str:
    """The text of an installed recipe.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if name not in recipe_names():
        raise UnknownNameError("recipe", name, recipe_names(), argument="recipe")
    return files(__package__).joinpath(name + SUFFIX).read_text(encoding="utf-8")


def comments_of(text: str) -> tuple[str, str]:
    """The purpose and the costs of a recipe, by the comments above its first pass; empty if it names none."""
    above = takewhile(lambda line: line.startswith("#"), text.strip().splitlines())
    summary, _, costs = " ".join(line.lstrip("# ").strip() for line in above).partition("Costs:")
    return summary.strip(), costs.strip()
