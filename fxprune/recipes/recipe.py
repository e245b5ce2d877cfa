"""Recipes: whole prunes as text, with a slot for each stage."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxprune.data.calibration import Calibration
from fxprune.discovery.groups import bare_kind
from fxprune.errors import FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.arguments import invalid, read_spelling, refuse, spelled_fields
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass, parse_pass, pass_names
from fxprune.recipes.texts import SUFFIX, comments_of, recipe_names, recipe_text

NONE = "none"
"""Spelling of a stage left out."""

_WANTED = "the name of a recipe, the path of a file with one, or a pipeline in text with a pass on each line"

_INHERITED = (
    *("kinds", "part", "ranking", "protect", "round_to", "uniform", "tensor_parallel", "budget", "ratio", "first"),
    *("target", "context", "reduction", "samples", "reach", "channel_samples", "width", "compensate"),
)
"""Arguments that mean the same in all passes of a stage: one that takes the place of another inherits them."""


class Recipe(UserDict[str, tuple[Pass, ...]]):
    """A prune as text: a pipeline with a slot for each stage.

    A recipe maps the stages of :data:`~fxprune.pipeline.contract.STAGES` to their passes, so that replacing a stage is
    an assignment: ``recipe["importance"] = "taylor{order=second}"``. None, ``"none"`` or deleting the key leaves the
    stage out. ``str()`` of it is its text.

    Args:
        text: the passes, one a line; lines that start with ``#`` are comments. Of the comments above the first pass,
            those from ``Costs:`` on describe the costs, those before it the purpose.

    Raises:
        FxpruneError: the text is no pipeline, or its passes do not stand in the order of their stages.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self._text, self._changed = name, text, False
        self.data = dict.fromkeys(STAGES, ())
        stage = STAGES[0]
        for step in _flat(Pipeline(text)):
            here = step.stage or stage
            if STAGES.index(here) < STAGES.index(stage):
                what = f"stands behind {self.data[stage][-1].name}, and {here} comes before {stage}"
                remedy = f"Order the passes by stage: {', '.join(STAGES)}"
                raise PassError(what, where=f"pass {step.name}", remedy=remedy)
            stage = here
            self.data[stage] = (*self.data[stage], step)

    def __setitem__(self, stage: str, choice: Pass | str | Sequence[Pass | str] | None) -> None:
        """Replace the passes of a stage.

        Args:
            choice: a pass, its spelling, several of these, or None.

        Raises:
            UnknownNameError: there is no such stage, or no such pass.
            ArgumentError: a pass is of another stage.
        """
        if stage not in self.data:
            raise UnknownNameError("stage", stage, STAGES)
        given: Any = (choice,) if isinstance(choice, str | Pass) or choice is None else choice
        if not isinstance(given, Sequence):
            raise refuse(stage, given, "a pass, its spelling, several of these, or None")
        made = [made_for(stage, one) for one in given]
        self.data[stage] = tuple(step for step in made if step is not None)
        self._changed = True

    def __delitem__(self, stage: str) -> None:
        self[stage] = None

    def __str__(self) -> str:
        return str(self.pipeline) if self._changed else self._text

    def __repr__(self) -> str:
        return f"Recipe({self.name!r}, {str(self)!r})"

    @property
    def summary(self) -> str:
        """Its purpose, in words."""
        return comments_of(self._text)[0]

    @property
    def costs(self) -> str:
        """Its costs, in words; empty if it names none."""
        return comments_of(self._text)[1]

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(step for stage in STAGES for step in self[stage])

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.passes)

    def copy(self) -> Recipe:
        """A copy whose stages can be replaced."""
        twin = Recipe(self.name, self._text)
        twin.data, twin._changed = dict(self.data), self._changed
        return twin

    def reads_samples(self) -> bool:
        """Whether the recipe names a file with calibration samples of its own."""
        return any(Calibration in step.gives and getattr(step, "file", "") for step in self.passes)

    def set_arguments(self, stage: str, arguments: Mapping[str, Any]) -> None:
        """Set arguments of the passes of a stage, for those that have them."""
        self[stage] = [changed(step, arguments) for step in self[stage]]

    def replace_stage(self, stage: str, choice: Pass | str | None, arguments: Mapping[str, Any]) -> None:
        """Replace the passes of a stage; one given as text inherits arguments of those whose place it takes.

        ``arguments`` are further ones of a pass given as text, for those it has and does not spell itself.
        """
        inside = [one for step in self[stage] for one in _passes_inside(step) if one.stage == stage]
        name = choice.partition("{")[0].strip() if isinstance(choice, str) else ""
        inside.sort(key=lambda one: one.name != name)  # its own arguments, before those of another criterion
        before = [*inside[:1], *self[stage]]
        old = {key: value for step in before for key, value in _arguments(step).items() if key in _INHERITED}
        if old.get("width") and name in pass_names(stage) and "width" not in _arguments(load_pass(name)):
            # a pass that measures no width leaves it whole
            old["kinds"] = tuple(kind for kind in old["kinds"] if bare_kind(kind) != "channel")
        inner = {stage: self[stage][0]} if self[stage] else {}  # for a pass that runs another one of its stage
        made = made_for(stage, choice, **{**old, **inner, **arguments})

        def inherit(one: Pass) -> Pass:
            """A copy with ``arguments`` where it has the default."""
            defaults, own = _arguments(type(one)()), _arguments(one)
            return changed(one, {key: value for key, value in arguments.items() if own.get(key) == defaults.get(key)})

        if made is not None and isinstance(choice, str):
            made = replace(made, **_inside(made, inherit))  # type: ignore[type-var]
        self[stage] = made
        if stage == "compensate":  # a selection that fits its candidates does so as the recipe does
            self["select"] = [
                changed(step, {stage: made}) if getattr(step, stage, None) is not None else step
                for step in self["select"]
            ]


def read_recipe(name: str) -> Recipe:
    """Load an installed recipe.

    Raises:
        UnknownNameError: there is none of this name.
    """
    return Recipe(name, recipe_text(name))


def as_recipe(value: Any) -> Recipe:
    """The recipe that an argument names.

    Args:
        value: a recipe; the name of an installed one; the path of a file with one, which ends in ``.txt``; or a
            pipeline in text, of two passes or more.

    Raises:
        UnknownNameError: no recipe of this name.
        FxpruneError: the file cannot be read, or the value is something else.
    """
    if isinstance(value, Recipe):
        return value.copy()
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(SUFFIX)):
        path = Path(value)
        try:
            return Recipe(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FxpruneError(f"cannot be read: {reason}", where=str(path), remedy=f"Pass {_WANTED}") from error
    if not isinstance(value, str):
        raise refuse("recipe", value, _WANTED)
    if "\n" in value or "," in value:
        return Recipe("", value)
    if value not in recipe_names() and (os.path.exists(value) or os.sep in value):
        what = f"it does not end in {SUFFIX}" if os.path.isfile(value) else "there is no such file"
        what = "it is a folder" if os.path.isdir(value) else what
        raise FxpruneError(what, where=value, remedy=f"Pass {_WANTED}")
    return read_recipe(value)


def made_for(stage: str, choice: Any, **defaults: Any) -> Pass | None:
    """The pass that a choice for a stage stands for; None to leave the stage out.

    Args:
        choice: a pass of the stage, or its spelling; None or ``"none"`` for no pass.
        defaults: arguments of a pass given as text, where the text does not set them.

    Raises:
        UnknownNameError: there is no such pass in this stage.
        ArgumentError: it is a pass of another stage, or the stage cannot be left out.
    """
    known = pass_names(stage)
    if choice is None or (choice == NONE and stage in ("teach", "compensate", "tune")):
        return None
    if isinstance(choice, Pass):
        if choice.stage in ("", stage):
            return choice
        remedy = f"Pass one of {', '.join(known)}, or a pass of your own of the stage {stage!r}"
        raise invalid(stage, choice, f"${stage} is the pass {choice.name}, of the stage {choice.stage!r}", remedy)
    if not isinstance(choice, str):
        raise refuse(stage, choice, f"one of {', '.join(known)}, or a pass, as in fxprune.load_pass({known[0]!r})")
    name = read_spelling(choice)[0]
    if name not in known:
        raise UnknownNameError(stage, name, known, argument=stage)
    return parse_pass(choice, **defaults)


def needs_samples(step: Pass) -> bool:
    """Whether a pass, or one among its arguments, needs calibration samples."""
    return Calibration in step.needs or any(map(needs_samples, _passes_inside(step)))


def changed(step: Pass, arguments: Mapping[str, Any]) -> Pass:
    """A copy of a pass with those of ``arguments`` that it has, or that a pass inside it of the same stage has."""
    own = _arguments(step)
    known = {key: value for key, value in arguments.items() if key in own}
    new = _inside(step, lambda one: changed(one, arguments)) | known
    return type(step)(**own | new) if new else step


def _passes_inside(step: Pass) -> list[Pass]:
    """The passes among the arguments of a pass, alone or in a tuple."""
    values = (value if isinstance(value, tuple) else (value,) for value in vars(step).values())
    return [one for several in values for one in several if isinstance(one, Pass)]


def _inside(step: Pass, change: Callable[[Pass], Pass]) -> dict[str, Any]:
    """Changed passes of the same stage among the arguments of a pass, alone or in a tuple."""
    found: dict[str, Any] = {}
    for key, value in _arguments(step).items():
        if isinstance(value, Pass) and value.stage == step.stage:
            found[key] = change(value)
        elif isinstance(value, tuple) and any(isinstance(one, Pass) and one.stage == step.stage for one in value):
            found[key] = tuple(map(change, value))
    return found


def _arguments(step: Pass) -> dict[str, Any]:
    return {field.name: getattr(step, field.name) for field in spelled_fields(step)}


def _flat(step: Pass) -> list[Pass]:
    return [leaf for one in step.passes for leaf in _flat(one)] if isinstance(step, Pipeline) else [step]
