"""What arguments of a prune stand for: passes in place of those of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from fxprune.data.calibration import Calibration
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import refuse
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.registry import load_pass, parse_pass, pass_class, pass_names
from fxprune.pipeline.spelling import read_spelling
from fxprune.recipes.compose import Making
from fxprune.removal.scores import Scores

__all__ = ["NONE", "kept_scores", "made_places", "needs_no_data", "said", "stage_passes", "unless", "with_order"]

NONE = "none"
"""Spells that a stage is left out, whatever the recipe says."""

_OPTIONAL = ("compensate", "tune")
"""Stages that may be left out."""

_WORDS = {"compensate": "compensation", "select": "selection"}
"""What a stage is called in messages, where not by its own name."""


def needs_no_data(importance: Any) -> bool:
    """Whether an importance is named that needs no samples."""
    if isinstance(importance, str):
        name = read_spelling(importance)[0]
        return name in pass_names("importance") and Calibration not in pass_class(name).needs
    return isinstance(importance, Pass) and Calibration not in importance.needs


def said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def unless(name: str, value: Any, default: Any) -> dict[str, Any]:
    """Return ``value`` by its name; nothing where it is the default."""
    return {} if type(value) is type(default) and value == default else {name: value}


def made_places(
    choices: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]], before: Mapping[str, str]
) -> dict[str, Making]:
    """Return what makes the passes of each stage that a call decides itself.

    Args:
        choices: by stage the pass, or its spelling; None where the recipe decides.
        options: by stage the arguments that the call gives; under ``""`` those of all stages.
        before: by stage the name of a pass that has to go before.
    """
    return {
        stage: partial(
            stage_passes, choice, stage, {**options.get("", {}), **options.get(stage, {})}, before.get(stage, "")
        )
        for stage, choice in choices.items()
        if choice is not None
    }


def stage_passes(
    choice: str | Pass, stage: str, options: Mapping[str, Any], before: str, old: Mapping[str, Any]
) -> tuple[Pass, ...]:
    """Return the passes that a choice for a stage stands for.

    Args:
        choice: the pass, or its spelling; ``none`` for no pass.
        stage: the stage.
        options: arguments where the spelling does not say otherwise.
        before: the name of a pass that has to go before; empty for none.
        old: arguments of the passes whose place it takes, where neither does.
    """
    if stage in _OPTIONAL and isinstance(choice, str) and choice == NONE:
        return ()
    made = _stage(choice, stage, **{**old, **options})
    return (parse_pass(before, **options), made) if before else (made,)


def kept_scores(name: str, scores: Scores | str | os.PathLike[str]) -> Pass:
    """Return the pass ``name``, which takes scores, or a file of them."""
    return load_pass(name, scores=scores) if isinstance(scores, Scores) else load_pass(name, file=scores)


def with_order(name: str, importance: Any, order: str | None) -> Any:
    """Return the spelling of the importance ``name`` with an order, unless another importance is asked for."""
    if order is None:
        return importance
    spelled = f"{name}{{order={order}}}"
    if importance is None or importance == name:
        return spelled
    raise FxpruneError(
        f"{name}={order!r} beside importance={str(importance)!r}",
        where=name,
        remedy=f"Leave one of them out; importance={spelled!r} says both",
    )


def _stage(choice: str | Pass, stage: str, **defaults: Any) -> Pass:
    """Return the pass, or the one of ``stage`` spelled so; ``defaults`` fill in what the spelling leaves open."""
    known = pass_names(stage)
    if isinstance(choice, Pass):
        if choice.stage in ("", stage):
            return choice
        raise ArgumentError(
            f"{stage} is the pass {choice.name}, of the stage {choice.stage!r}",
            where=stage,
            remedy=f"Pass one of {', '.join(known)}, or a pass of your own of the stage {stage!r}",
        )
    if not isinstance(choice, str):
        raise refuse(stage, choice, f"one of {', '.join(known)}, or a pass, as in fxprune.load_pass({known[0]!r})")
    name = read_spelling(choice)[0]
    if name not in known:
        raise UnknownNameError(_WORDS.get(stage, stage), name, known)
    return parse_pass(choice, **defaults)
