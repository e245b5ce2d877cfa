"""Prunes that are measured: recipes with their controls, and recipes with one ingredient changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

import fxprune
from fxprune.data.calibration import Calibration
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import DEFAULT_KINDS, Groups
from fxprune.graph.facts import Change, Fact, Runnable, facts_of, fork
from fxprune.pipeline.arguments import argument, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.registry import pass_argument
from fxprune.recipes import Recipe, read_recipe
from fxprune.removal.removal import Scores


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


@dataclass(frozen=True, eq=False)
class ShuffledScoresPass(Pass):
    """Scores by a criterion, shuffled within each group: its width stays, and the units are random."""

    name: ClassVar[str] = "shuffled-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Runnable, Calibration)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    importance: Pass = argument("wanda", "The criterion.", check=pass_argument("importance"))
    seed: int = argument(0, "Random seed.", check=as_seed)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Score the units, and shuffle the scores."""
        work, generator = fork(graph_module), np.random.default_rng(self.seed)
        self.importance(work)
        rows = facts_of(work)[Scores].units
        shuffled = {name: generator.permutation(row.ravel()).reshape(row.shape) for name, row in rows.items()}
        facts_of(graph_module).put(Scores(shuffled, str(self)))
        return PassResult(graph_module, False)


def _random_units(name: str) -> Entry:
    """A recipe with random units, and the widths that its scores give."""
    return _changed(name, "random units", importance=ShuffledScoresPass(importance=read_recipe(name)["importance"][0]))


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


def _less_varied() -> Recipe:
    """The default recipe with fewer of its own programs and other languages among the samples, as it was once."""
    recipe = _calibrated("balanced", added=192, programs=0.125, languages=0.25)
    recipe.set_arguments("teach", {"samples": 576})
    return recipe


def _on_the_given_text() -> Recipe:
    """The fast recipe without samples that the model generates."""
    recipe = _calibrated("fast", added=0, programs=0.0)
    recipe["importance"] = (
        "multiply-scores{criteria=[wanda{readers_only, samples=64}, taylor{order=second, samples=32}]}"
    )
    return recipe


_RANKED: dict[str, dict[str, Any]] = {
    "": {},
    ", ranked locally": {"ranking": "local"},
    ", ranked globally": {"ranking": "global"},
}
"""Rankings, by their names in entries."""

ENTRIES = (
    Entry("llm-pruner", {"recipe": "llm-pruner"}, samples=10),
    Entry("FLAP", {"recipe": "llm-pruner", "importance": "flap", "ranking": "global"}, samples=64),
    Entry("fast", {"recipe": "fast"}),
    Entry("balanced", {}),
    Entry("best", {"recipe": "best"}),
    _random_units("fast"),
    _random_units("balanced"),
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
    *(
        Entry(f"{name}{ranked}", {"recipe": name, **ranking})
        for name in ("fast", "balanced", "best")
        for ranked, ranking in _RANKED.items()
        if ranking
    ),
    *(_changed(name, "width whole", kinds=DEFAULT_KINDS) for name in ("fast", "balanced")),
    _changed("fast", "by gradients alone", importance="taylor{order=second}"),
    _changed("fast", "by forward passes alone", importance="wanda{readers_only}"),
    _changed("fast", "heads too", select="select-by-ratio{first=[]}"),
    _changed("fast", "no layer protected", protect=(0, 0)),
    _changed("fast", "uniform", uniform=True),
    _changed("fast", "not fitted", compensate="none"),
    _changed("fast", "the stream not fitted", compensate="least-squares{reach=lost}"),
    _changed("fast", "rotation", compensate="rotation"),
    *(
        Entry(f"{name}{ranked}, without programs", {"recipe": _calibrated(name, programs=0.0), **ranking})
        for name in ("fast", "balanced", "best")
        for ranked, ranking in _RANKED.items()
    ),
    *(
        Entry(f"fast{ranked}, on the given text alone", {"recipe": _on_the_given_text(), **ranking})
        for ranked, ranking in _RANKED.items()
    ),
    Entry("balanced, less varied", {"recipe": _less_varied()}),
    Entry(
        "balanced, less varied, scored on fewer samples",
        {
            "recipe": _less_varied(),
            "importance": "multiply-scores{criteria=[wanda{readers_only, samples=128}, "
            "taylor{order=second, samples=64}]}",
        },
    ),
    _changed("balanced", "not fitted", compensate="none"),
    Entry("balanced, no samples given", {}, samples=0),
    _changed("balanced", "by updates of rank 8", tune="tune{weights=False}"),
)
"""Recipes with a change, the last one that is named. Most change `fast`: tuning evens out differences between its
starting points, and takes the most time."""

WITHDRAWN = (
    "fast, ranked half way",
    "balanced, ranked half way",
    "fast, by gates",
    "fast, ranked locally, searched",
    "fast, ranked globally, searched",
)
"""Ablations whose rows are results, and whose change did not pay and is no longer in the package."""


@cache
def is_current(name: str, ratio: float, draw: int, passes: str) -> bool:
    """Whether an entry makes these passes now; its recipe may have been another one when they ran."""
    for entry in entries([name]):
        samples = torch.zeros(1, 2, dtype=torch.long)
        pipeline = fxprune.prune_pipeline(samples, **{**entry.options, "ratio": ratio, "seed": draw})
        if entry.samples == 0 or passes == str(pipeline):
            return True
        try:
            return str(fxprune.Pipeline(passes)) == str(pipeline)  # other spellings of the same arguments
        except fxprune.FxpruneError:  # a pass or an argument that is no more
            return False
    return not passes


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
