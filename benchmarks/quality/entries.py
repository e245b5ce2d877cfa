"""Prunes that are measured: recipes with their controls, and recipes with one ingredient changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

import fxprune
from fxprune.discovery.groups import DEFAULT_KINDS
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.pipeline.arguments import argument, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.recipes import Recipe, read_recipe
from fxprune.removal.removal import Removal

CONTROL = ", random units"
"""End of the name of an entry whose units are drawn at random, with the widths and all else of the one before it."""


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
class RandomUnitsPass(Pass):
    """Random units in place of those selected, as many of each group: the same widths, residual width too."""

    name: ClassVar[str] = "random-units"
    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Removal,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    seed: int = argument(0, "Random seed.", check=as_seed)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Shuffle within each group which of the units stay."""
        removal, generator = facts_of(graph_module)[Removal], np.random.default_rng(self.seed)
        stay = {factor: generator.permuted(mask, axis=-1) for factor, mask in removal.keep.units.items()}
        facts_of(graph_module).put(replace(removal, keep=replace(removal.keep, units=stay)))
        return PassResult(graph_module, False)


def _random_units(name: str) -> Entry:
    """A recipe with random units, of the widths that it gives."""
    recipe = read_recipe(name)
    recipe["select"] = (*recipe["select"], RandomUnitsPass())
    return Entry(f"{name}{CONTROL}", {"recipe": recipe})


def _calibrated(name: str, **arguments: Any) -> Recipe:
    """A recipe with other arguments of its samples."""
    recipe = read_recipe(name)
    recipe.set_arguments("prepare", arguments)
    return recipe


def _fitted_and_tuned(name: str, importance: str, select: str) -> Entry:
    """The default recipe with scores and a selection of another method."""
    recipe = read_recipe("balanced")
    recipe["importance"], recipe["select"] = importance, select
    return Entry(f"{name}, fitted and tuned as balanced", {"recipe": recipe})


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
    Entry("FLAP", {"recipe": "llm-pruner", "importance": "flap{standardise}", "ranking": "global"}, samples=64),
    Entry("FLAP, not standardised", {"recipe": "llm-pruner", "importance": "flap", "ranking": "global"}, samples=64),
    Entry("fast", {"recipe": "fast"}),
    Entry("balanced", {}),
    Entry("best", {"recipe": "best"}),
    _random_units("fast"),
    _random_units("balanced"),
    _fitted_and_tuned("llm-pruner", "taylor{samples=64}", "select-by-ratio"),
    _fitted_and_tuned("FLAP", "flap{samples=64, standardise}", "select-by-ratio{ranking=global}"),
    _fitted_and_tuned("FLAP, not standardised", "flap{samples=64}", "select-by-ratio{ranking=global}"),
    _fitted_and_tuned("whole layers", "block-influence{samples=64}", "select-by-ratio{kinds=[layer], protect=[]}"),
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

EARLIER = {
    "fast": ("fast, width whole",),
    "balanced": ("balanced, width whole", "balanced, less varied", "balanced, less varied, scored on fewer samples"),
}
"""Earlier versions of a recipe, by entry: an ablation that was measured with one is compared with it."""

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
