"""Prunes that are measured: recipes, and the default recipe with one change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.recipes import as_recipe, read_recipe


@dataclass(frozen=True)
class Entry:
    """A prune to measure.

    Attributes:
        name: Name in tables.
        options: Arguments of `fxprune.prune`; `%s` in a value stands for the ratio.
        samples: Most calibration samples; None for all, 0 for built-in samples.
    """

    name: str
    options: dict[str, Any]
    samples: int | None = None


TUNE = "tune{epochs=1, measurements=3"
HEADS = "select-by-ratio{kinds=[mlp, head], protect=[0.07, 0.04], ratio=%s}"
CHOSEN = "protect=[0.07, 0.04], first=[mlp], ratio=%s"
WHOLE = "select-by-ratio{first=[mlp], protect=[], ratio=%s}"


def _by_wanda(name: str, samples: int) -> str:
    """A recipe with the scores, the samples and, for the default, the tuning that it had before."""
    recipe = read_recipe(name)
    recipe["prepare"] = f"calibrate{{written={1024 if name == 'best' else 288}}}"
    if name == "balanced":
        recipe["teach"], recipe["tune"] = "record-teacher{samples=288}", f"{TUNE}, rank=8, truth=0.2}}"
    recipe["importance"] = f"wanda{{samples={samples}}}"
    recipe["select"] = "select-by-ratio{protect=[0.07, 0.04], first=[mlp]}"
    return str(recipe)


def _calibrated(name: str, **arguments: Any) -> str:
    """A recipe with other arguments of its samples."""
    recipe = read_recipe(name)
    recipe.set_arguments("prepare", arguments)
    return str(recipe)


def _fitted_and_tuned(importance: str, select: str, recipe: str = "balanced") -> str:
    """The default recipe, or another one, with scores and a selection of another method."""
    changed = as_recipe(recipe)
    changed["importance"], changed["select"] = importance, select
    return str(changed)


SECOND, READERS = "taylor{order=second}", "wanda{readers_only}"
FAST_GIVEN = _calibrated("fast", added=0, programs=0.0).replace("=96", "=64").replace("=48", "=32")
FORWARD = {"recipe": FAST_GIVEN, "ranking": "local"}
BALANCED = _by_wanda("balanced", 64)
UNCOUNTED = BALANCED.replace(", truth=0.2", "")
BUILT_IN = BALANCED.replace("{written=288}", "{built_in=288}")
GIVEN = _calibrated("balanced", added=0, programs=0.0).replace("=576", "=288").replace("weights=auto, ", "")
PROSE = {name: _calibrated(name, programs=0.0) for name in ("fast", "balanced", "best")}
"""Recipes as they were before the model wrote programs too."""
BEST = _by_wanda("best", 128)
ONCE = BEST.replace("{copies=3, noise=0.2}", "").replace(", truth=0.2", "")
SEARCHED = (
    ONCE.replace("wanda{samples=128}", "taylor{order=second, samples=128}")
    .replace("select-by-ratio", "select-by-search")
    .replace("least-squares{samples=128", "least-squares{samples=256")
    .replace("epochs=1", "epochs=2")
)


def _untuned(change: str, samples: int | None = None, **options: str) -> Entry:
    """``balanced by wanda`` with one change, not tuned."""
    return Entry(f"balanced, {change}", {"recipe": BALANCED, **options, "tune": "none"}, samples)


ENTRIES = (
    Entry("llm-pruner", {"recipe": "llm-pruner"}, samples=10),
    Entry("FLAP", {"recipe": "llm-pruner", "importance": "flap", "ranking": "global"}, samples=64),
    Entry("fast", {"recipe": "fast"}),
    Entry("fast, uniform", {"recipe": "fast", "uniform": True}),
    Entry("fast, searched", {"recipe": "fast", "select": f"select-by-search{{{CHOSEN}}}"}),
    Entry("balanced", {}),
    Entry("balanced, by updates of rank 8 on the given text", {"recipe": GIVEN}),
    Entry("best", {"recipe": "best"}),
    Entry("balanced, by gates", {"select": f"select-by-gates{{{CHOSEN}}}"}),
    Entry("fast, random units", {"recipe": "fast", "importance": "random"}),
    Entry("balanced, random units", {"importance": "random"}),
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
    *(Entry(f"{name}, without programs", {"recipe": recipe}) for name, recipe in PROSE.items()),
    *(
        Entry(f"{name}, without programs, random units", {"recipe": PROSE[name], "importance": "random"})
        for name in ("fast", "balanced")
    ),
    Entry(
        "llm-pruner, fitted and tuned as balanced without programs",
        {"recipe": _fitted_and_tuned("taylor{samples=64}", "select-by-ratio", PROSE["balanced"])},
    ),
    Entry("fast, on the given text alone", {"recipe": FAST_GIVEN}),
    Entry("fast, on the given text alone, random units", {"recipe": FAST_GIVEN, "importance": "random"}),
    Entry("fast, on the given text alone, by gradients", {"recipe": FAST_GIVEN, "importance": SECOND}),
    Entry(
        "fast, on the given text alone, by gradients, uniform",
        {"recipe": FAST_GIVEN, "importance": SECOND, "uniform": True},
    ),
    Entry("fast, by gradients alone", {"recipe": "fast", "importance": SECOND}),
    Entry("balanced, by gradients alone", {"importance": SECOND}),
    Entry("fast, by forward passes alone", {"recipe": "fast", "importance": READERS}),
    Entry("balanced, by forward passes alone", {"importance": READERS}),
    Entry("fast by forward passes", {**FORWARD, "importance": READERS}),
    Entry("fast by forward passes, random units", {**FORWARD, "importance": "random"}),
    Entry("balanced by local ranking", {"ranking": "local"}),
    Entry("fast by wanda", {**FORWARD, "importance": "wanda"}),
    Entry("balanced by wanda", {"recipe": BALANCED}),
    Entry("best by wanda", {"recipe": BEST}),
    Entry("balanced, no samples given", {"recipe": BALANCED}, samples=0),
    Entry("balanced, on built-in text alone", {"recipe": BUILT_IN}, samples=0),
    Entry("balanced, the text itself not counted", {"recipe": UNCOUNTED}),
    Entry("balanced, MLPs of multiples of 32", {"recipe": BALANCED, "round_to": {"mlp": 32}}),
    Entry("best, the text itself not counted", {"recipe": BEST.replace(", truth=0.2", "")}),
    Entry("best, each sample once", {"recipe": BEST.replace("{copies=3, noise=0.2}", "")}),
    Entry("best, each sample once, the text not counted", {"recipe": ONCE}),
    Entry("best, searched, fitted by 256 samples, each read twice", {"recipe": SEARCHED}),
    _untuned("neither fitted nor tuned", compensate="none"),
    _untuned("not tuned"),
    Entry("balanced, not fitted", {"recipe": BALANCED, "compensate": "none"}),
    _untuned("heads too", select=HEADS),
    _untuned("no layer protected", select=WHOLE),
    _untuned("searched", select=f"select-by-search{{{CHOSEN}}}"),
    _untuned("gates", samples=512, select=f"select-by-gates{{{CHOSEN}}}"),
    Entry(
        "balanced, gates, tuned, the text itself not counted",
        {"recipe": UNCOUNTED, "select": f"select-by-gates{{{CHOSEN}}}"},
        samples=512,
    ),
    _untuned("one ridge", compensate="least-squares{samples=64, reach=stream, damping=1}"),
    _untuned("the stream not fitted", compensate="least-squares{samples=64, reach=lost}"),
    _untuned("rotation", compensate="rotation{samples=64}"),
    Entry("balanced, tuned where inputs went", {"recipe": BALANCED, "tune": f"{TUNE}, everywhere=False, rate=0.02}}"}),
    Entry("balanced, scales alone tuned", {"recipe": BALANCED, "tune": f"{TUNE}}}"}),
    Entry("balanced, the weights tuned", {"recipe": BALANCED, "tune": f"{TUNE}, weights=True}}"}),
    _untuned("taylor mix", importance="taylor{order=mix, samples=32}"),
    _untuned("taylor second", importance="taylor{order=second, samples=32}"),
    _untuned("flap", importance="flap{samples=64}"),
    _untuned("fisher", importance="fisher{samples=64}"),
    _untuned("reconstruction", importance="reconstruction{samples=64}"),
)
"""Recipes first, with their controls: random units of the same widths, and the selections of other methods with the fit
and the tuning of the default recipe. Then the recipes by one of their two criteria alone and with the scores they had
before, and ``balanced by wanda`` with one change. Most of these are not tuned: tuning evens out differences between its
starting points, and takes the most time."""


def entries(names: Sequence[str] = ()) -> list[Entry]:
    """All entries; if there are `names`, only these."""
    return [entry for entry in ENTRIES if not names or entry.name in names]


def place_of_entry(name: str) -> int:
    """Place of an entry in tables; names that no longer exist come last."""
    names = [entry.name for entry in ENTRIES]
    return names.index(name) if name in names else len(names)
