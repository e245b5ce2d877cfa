"""From a recipe and what a call says otherwise to the passes that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxprune.data.calibration import Calibration
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.spelling import spelled_fields
from fxprune.recipes.recipe import Recipe
from fxprune.report.report import Work

__all__ = ["Making", "Wishes", "compose", "selects_by_samples"]

_WIDTHS = ("kinds", "ranking", "protect", "round_to", "uniform", "tensor_parallel", "budget", "ratio", "first")
_CARRIED = (*_WIDTHS, "reduction", "samples", "reach")
"""Arguments that mean the same in all passes of a stage: one that takes the place of another has them from it."""

_DATA_STAGES = ("compensate", "tune")
"""What works on samples and can be left out."""

_SOURCES = ("data", "file", "tokenizer")
"""Arguments that say where samples come from."""

_BEFORE = ("discover", "importance", "select")
"""Stages before which nothing changes."""

Making = Callable[[Mapping[str, Any]], Sequence[Pass]]
"""Makes the passes of a stage, given the arguments of those whose place they take."""


@dataclass(frozen=True)
class Wishes:
    """What a call says about a recipe.

    Args:
        places: for each stage that the call decides itself, what makes its passes, given the arguments of those whose
            place they take; it may make none.
        options: arguments of the recipe's passes by stage, for those that have them; under ``""`` those of all stages.
        calibration: reads the samples; None where there are none, but those that the recipe reads itself.
        without_data: leave out what works on samples, unless the call decides on it itself.
        verify: whether removing is compared with masking.
        again: makes a pass that scores in steps, given the spellings of what scores, selects and compensates; None
            where it scores once.
    """

    places: Mapping[str, Making] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Pass | None = None
    without_data: bool = False
    verify: bool = True
    again: Callable[..., Pass] | None = None


def compose(recipe: Recipe, wishes: Wishes) -> list[Pass]:
    """Return the passes of ``recipe`` with what ``wishes`` says in place of what it says itself.

    A stage that the recipe has no pass of gets its own where its turn is: compensation after the decision, tuning
    before the slim model is emitted, and what it learns from while the model is still as it was.
    """
    passes = [step for step in recipe.passes if wishes.verify or step.stage != "verify"]
    if wishes.without_data and not any(map(_has_file, passes)):
        passes = [step for step in passes if step.stage not in _DATA_STAGES or step.stage in wishes.places]
    passes = _with_samples([_with_options(step, wishes.options) for step in passes], wishes)
    for stage in sorted(wishes.places, key=STAGES.index):  # what is tuned by is inserted last, before what compensates
        passes = _replaced(passes, stage, wishes.places[stage])
    return passes if wishes.again is None else _in_steps(passes, wishes.again)


def _in_steps(passes: Sequence[Pass], again: Callable[..., Pass]) -> list[Pass]:
    """The passes with what scores replaced by what scores in steps, where something scores and selects."""
    first = {step.stage: step for step in reversed(passes)}
    if "importance" not in first or "select" not in first:
        return list(passes)
    spelled = {stage: str(first[stage]) for stage in ("importance", "select", "compensate") if stage in first}
    return [again(**spelled) if step is first["importance"] else step for step in passes]


def _with_samples(passes: Sequence[Pass], wishes: Wishes) -> list[Pass]:
    """The passes with the samples given in place of those that the recipe reads; without a pass that has none."""
    given, readers = wishes.calibration, [step for step in passes if Calibration in step.gives]
    if given is not None:
        named = {key: value for key, value in _arguments(given).items() if key in _SOURCES}
        stay = [step for step in readers if _has_file(step) and named.get("data") is None]
        rest = [_changed(step, named) if step in readers and step not in stay else step for step in passes]
        return rest if readers else [given, *rest]
    return [step for step in passes if step not in readers or _has_file(step)]


def _has_file(step: Pass) -> bool:
    return Calibration in step.gives and bool(_arguments(step).get("file"))


def selects_by_samples(recipe: Recipe) -> bool:
    """Whether a selection of the recipe needs samples, which it does not read itself."""
    passes = recipe.passes
    needed = any(step.stage == "select" and Calibration in step.needs for step in passes)
    return needed and not any(map(_has_file, passes))


def _replaced(passes: Sequence[Pass], stage: str, make: Making) -> list[Pass]:
    """The passes with those of a stage replaced; of tuning those that learn, where what they learn from is there."""
    old = [step for step in passes if step.stage == stage]
    made = make({key: value for step in old for key, value in _arguments(step).items() if key in _CARRIED})
    kept = [step for step in old if made and stage == "tune" and step.changes == "nothing"]
    made = [step for step in made if not kept or step.changes != "nothing"]
    rest, places = [], dict.fromkeys(range(len(made)), -1)
    for step in passes:
        if step.stage != stage or step in kept:
            rest.append(step)
            continue
        for number in [n for n, new in enumerate(made) if places[n] < 0 and _alike(new, step)]:
            places[number] = len(rest)
    for number, step in enumerate(made):
        at = places[number] if places[number] >= 0 else _turn(rest, stage, step)
        rest.insert(at, step)
    return rest


def _alike(a: Pass, b: Pass) -> bool:
    """Whether both only look, or both change something."""
    return (a.changes == "nothing") == (b.changes == "nothing")


def _turn(passes: Sequence[Pass], stage: str, made: Pass) -> int:
    """Where a pass goes that takes the place of none."""
    if stage == "tune" and made.changes != "nothing":
        return next((i for i, step in enumerate(passes) if step.stage == "emit"), len(passes))
    before = [i for i, step in enumerate(passes) if step.stage in _BEFORE or Work in step.gives]
    return max(before, default=-1) + 1


def _with_options(step: Pass, options: Mapping[str, Mapping[str, Any]]) -> Pass:
    given = {**options.get("", {}), **options.get(step.stage, {})}
    known = {key: value for key, value in given.items() if key in _arguments(step)}
    return _changed(step, known) if known else step


def _changed(step: Pass, arguments: Mapping[str, Any]) -> Pass:
    return type(step)(**_arguments(step) | dict(arguments))


def _arguments(step: Pass) -> dict[str, Any]:
    return {argument.name: getattr(step, argument.name) for argument in spelled_fields(step)}
