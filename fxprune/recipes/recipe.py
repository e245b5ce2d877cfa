"""What a recipe is: a pipeline in text, with what it is for and what it costs in the comments above it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import refuse
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.pipeline import Pipeline

__all__ = ["Recipe", "as_recipe", "read_recipe", "recipe_names"]

_SUFFIX = ".txt"
_COSTS = "Costs:"
_WANTED = "the name of a recipe, the path of a file with one, or a pipeline in text with a pass on each line"

_ORDER = ("fast", "balanced", "best", "llm-pruner")
"""The installed ones, from little work to much, and the published one last."""


@dataclass(frozen=True)
class Recipe:
    """A pipeline in text, to be printed, edited and run.

    Args:
        name: what it is called.
        text: the passes, one a line; lines that start with ``#`` are comments. Of the comments above the first pass,
            those that follow one that starts with ``Costs:`` say what it costs, those before say what it does.
    """

    name: str
    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text

    @property
    def summary(self) -> str:
        """What it does, in words."""
        return self._comments[0]

    @property
    def costs(self) -> str:
        """What it takes, in words; empty where it does not say."""
        return self._comments[1]

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, in order, those of pipelines inside it too.

        Raises:
            FxpruneError: the text is no pipeline.
        """
        return tuple(_flat(Pipeline(self.text)))

    @property
    def _comments(self) -> tuple[str, str]:
        lines = []
        for line in self.text.strip().splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").strip())
        summary, _, costs = " ".join(lines).partition(_COSTS)
        return summary.strip(), costs.strip()


def recipe_names() -> tuple[str, ...]:
    """Return the names of the installed recipes, from little work to much, and the published one last."""
    found = {path.name.removesuffix(_SUFFIX) for path in files(__package__).iterdir() if path.name.endswith(_SUFFIX)}
    return tuple(sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


def read_recipe(name: str) -> Recipe:
    """Return an installed recipe.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if name not in recipe_names():
        raise UnknownNameError("recipe", name, recipe_names())
    return Recipe(name, files(__package__).joinpath(name + _SUFFIX).read_text(encoding="utf-8"))


def as_recipe(value: Any) -> Recipe:
    """Return the recipe that an argument names.

    Args:
        value: a recipe; the name of an installed one; the path of a file with one, which ends in ``.txt``; or a
            pipeline in text, of two passes or more.

    Raises:
        UnknownNameError: no recipe of this name.
        FxpruneError: the file cannot be read, or it is something else.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(_SUFFIX)):
        path = Path(value)
        try:
            return Recipe(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FxpruneError(f"cannot be read: {error}", where=str(path), remedy=f"Pass {_WANTED}") from error
    if not isinstance(value, str):
        raise refuse("recipe", value, _WANTED)
    return Recipe("", value) if "\n" in value or "," in value else read_recipe(value)


def _flat(pipeline: Pipeline) -> list[Pass]:
    """The steps of a pipeline, and of those inside it."""
    return [leaf for step in pipeline.passes for leaf in (_flat(step) if isinstance(step, Pipeline) else (step,))]
