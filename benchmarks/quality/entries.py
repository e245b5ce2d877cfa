"""Prunes that are measured: recipes with their controls, and recipes with one ingredient changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.recipes import Recipe, read_recipe


@dataclass(frozen=True)
class Entry:
    """A prune to measure.

    Attributes:
        name: Name in tables.
        options: Arguments of `fxprune.prune`.
        samples: Most calibration samples; None for all, 0 for built-in samples.
    """

    name: str
    options: dict[str, Any]
    samples: int | None = None


def _calibrated(name: str, **arguments: Any) -> Recipe:
    """A recipe with other arguments of its samples."""
    recipe = read_recipe(name)
    recipe.set_arguments("prepare", arguments)
    return recipe


def _fitted_and_tuned(importance: str, select: str) -> Recipe:
    """The default recipe with scores and a selection of another method."""
    recipe = read_recipe("balanced")
    recipe["importance"], recipe["select"] = importance, select
    return recipe


def _changed(name: str, change: str, **options: Any) -> Entry:
    """A recipe with one change."""
    return Entry(f"{name}, {change}", {"recipe": name, **options})


def _on_the_given_text() -> Recipe:
    """The fast recipe without samples that the model generates."""
    recipe = _calibrated("fast", added=0, programs=0.0)
    recipe["importance"] = (
        "multiply-scores{criteria=[wanda{readers_only, samples=64}, taylor{order=second, samples=32}]}"
    )
    return recipe


ENTRIES = (
    Entry("llm-pruner", {"recipe": "llm-pruner"}, samples=10),
    Entry("FLAP", {"recipe": "llm-pruner", "importance": "flap", "ranking": "global"}, samples=64),
    Entry("fast", {"recipe": "fast"}),
    Entry("balanced", {}),
    Entry("best", {"recipe": "best"}),
    _changed("fast", "random units", importance="random"),
    _changed("balanced", "random units", importance="random"),
    Entry(
        "llm-pruner, fitted and tuned as balanced",
        {"recipe": _fitted_and_tuned("taylor{samples=64}", "select-by-ratio")},
    ),
    Entry(
        "FLAP, fitted and tuned as balanced",
        {"recipe": _fitted_and_tuned("flap{samples=64}", "select-by-ratio{ranking=global}")},
    ),
    Entry(
        "whole layers, fitted and tuned as balanced",
        {"recipe": _fitted_and_tuned("block-influence{samples=64}", "select-by-ratio{kinds=[layer], protect=[]}")},
    ),
)
"""Recipes, and their controls: random units of the same widths, and the selections of other methods with the fit and
the tuning of the default recipe."""

ABLATIONS = (
    _changed("fast", "by gradients alone", importance="taylor{order=second}"),
    _changed("fast", "by forward passes alone", importance="wanda{readers_only}"),
    _changed("fast", "ranked globally", ranking="global"),
    _changed("fast", "heads too", select="select-by-ratio{first=[]}"),
    _changed("fast", "no layer protected", protect=(0, 0)),
    _changed("fast", "uniform", uniform=True),
    _changed("fast", "not fitted", compensate="none"),
    _changed("fast", "the stream not fitted", compensate="least-squares{reach=lost}"),
    _changed("fast", "rotation", compensate="rotation"),
    *(
        Entry(f"{name}, without programs", {"recipe": _calibrated(name, programs=0.0)})
        for name in ("fast", "balanced", "best")
    ),
    Entry("fast, on the given text alone", {"recipe": _on_the_given_text()}),
    _changed("balanced", "by gates", select="select-by-gates"),
    _changed("balanced", "not fitted", compensate="none"),
    Entry("balanced, no samples given", {}, samples=0),
    _changed("balanced", "by updates of rank 8", tune="tune{weights=False}"),
)
"""Recipes with one change. Most change `fast`: tuning evens out differences between its starting points, and takes the
most time."""

WITHDRAWN = ("fast, searched",)
"""Ablations whose rows are results, and whose change did not pay and is no longer in the package."""


def entries(names: Sequence[str] = ()) -> list[Entry]:
    """All entries; if there are `names`, only these."""
    return [entry for entry in (*ENTRIES, *ABLATIONS) if not names or entry.name in names]


def place_of_entry(name: str) -> int:
    """Place of an entry in tables; models that are no entry come last."""
    names = [*(entry.name for entry in entries()), *WITHDRAWN]
    return names.index(name) if name in names else len(names)


def is_ablation(name: str) -> bool:
    """Whether an entry is a recipe with one ingredient changed."""
    return name in WITHDRAWN or any(entry.name == name for entry in ABLATIONS)
