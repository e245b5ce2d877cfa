"""Scores that know what went before: a part goes, what stays is fitted, and the rest is scored again."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError
from fxprune.graph.facts import Change, Fact, Runnable, facts_of, fork
from fxprune.graph.tensors import as_parameter, get_tensor, require_weights, set_tensor
from fxprune.offload.files import apart
from fxprune.pipeline.arguments import instance, whole_number
from fxprune.pipeline.contract import Pass, PassResult, Track, check_track, no_progress
from fxprune.pipeline.registry import parse_pass
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

__all__ = ["ScoreInStepsPass"]

_RATIOS = ("ratio", "group_ratio")


@dataclass(frozen=True, eq=False)
class ScoreInStepsPass(Pass):
    """Scores, takes a part of the ratio away, fits what stays, and scores again, as often as there are steps.

    What a step takes is zero in the graph that the next one scores, which computes what the slim graph computes. What
    went in a step stays gone: its scores are below all others, so that a selection by the scores of the last step, with
    the whole ratio, takes all of it.

    Source: iterative pruning as in Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference" (arXiv 1611.06440), section 2, with a fit in place of training.

    Args:
        importance: the spelling of the criterion.
        select: the spelling of the selection that follows, with its ratio; in step ``i`` of ``k`` that ratio is
            multiplied by ``i / k``.
        compensate: the spelling of the fit between steps, such as ``least-squares``; none where it is empty.
        steps: how often it scores.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "score-in-steps"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    importance: str = "l2"
    select: str = "select-by-ratio"
    compensate: str = ""
    steps: int = 2
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse passes of other stages, and a selection that has no ratio."""
        object.__setattr__(self, "steps", whole_number("steps", self.steps, least=1))
        check_track(self.track)
        self._made()

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless what the passes need is known, and there are real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)
        facts = facts_of(graph_module)
        for step in self._made():
            for kind in step.needs if step is not None else ():
                if kind not in (Scores, Removal) and kind not in facts:
                    raise facts.missing(kind, where=f"pass {self.name}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the scores of the last step."""
        importance, select, compensate = self._made()
        work, gone = fork(graph_module), None
        for step in self.track(range(1, self.steps + 1), self.name, self.steps):
            with apart(f"step-{step}"):
                importance(work)
                scores = below(facts_of(work)[Scores], gone)
                facts_of(work).put(scores)
                if step < self.steps:
                    part_of(select, step / self.steps)(work)
                    gone = facts_of(work)[Removal]
                    work = without(graph_module, gone, compensate)
        facts_of(graph_module).put(replace(scores, source=str(self)))
        return PassResult(graph_module, False)

    def _made(self) -> tuple[Pass, Pass, Pass | None]:
        made = [
            _of_stage(name, getattr(self, name), stage, self.track)
            for name, stage in (("importance", "importance"), ("select", "select"))
        ]
        part_of(made[1], 1.0)
        fit = _of_stage("compensate", self.compensate, "compensate", self.track) if self.compensate else None
        return made[0], made[1], fit


def below(scores: Scores, gone: Removal | None) -> Scores:
    """Return scores of which those of what is gone are below all others."""
    if gone is None:
        return scores
    units = {name: np.array(row) for name, row in scores.units.items()}
    lowest = min((float(row.min()) for row in units.values()), default=0.0) - 1
    for group in gone.groups:
        if group.name not in units:
            continue
        if group.factor is None and group.block in gone.removed_blocks:
            units[group.name][...] = lowest
        elif group.factor is not None and group.factor in gone.keep.units:
            units[group.name][~gone.keep.units[group.factor]] = lowest
    return replace(scores, units=units)


def without(graph_module: fx.GraphModule, gone: Removal, fit: Pass | None) -> fx.GraphModule:
    """Return a graph with what is gone zeroed and the weights fitted; ``graph_module`` stays as it is."""
    work = fork(graph_module)
    if fit is not None:
        facts_of(work).put(gone)
        work = fit(work, inplace=True).graph_module
    plan = gone.plan
    with torch.no_grad():
        for name, by_axis in plan.kept.items():
            tensor = get_tensor(work, name)
            value = tensor.detach().clone()
            for axis, kept in by_axis.items():
                left = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
                left[kept] = True
                value *= left.view(-1, *[1] * (value.dim() - axis - 1))
            set_tensor(work, name, as_parameter(value, tensor))
        for name in gone.axes.parameters:
            if any(name.startswith(f"{block}.") for block in plan.removed_blocks):
                tensor = get_tensor(work, name)
                set_tensor(work, name, as_parameter(torch.zeros_like(tensor), tensor))
    return work


def part_of(select: Pass, part: float) -> Pass:
    """Return a selection with a part of its ratio.

    Raises:
        ArgumentError: it has none.
    """
    named = [f.name for f in fields(select) if f.name in _RATIOS]  # type: ignore[arg-type]
    if len(named) != 1:
        raise ArgumentError(
            f"{select.name} has no ratio to take in steps", where="select", remedy="Use select-by-ratio"
        )
    ratio: Any = getattr(select, named[0])
    scaled = tuple((kind, value * part) for kind, value in ratio) if isinstance(ratio, tuple) else ratio * part
    return replace(select, **{named[0]: scaled})  # type: ignore[type-var]


def _of_stage(name: str, spelling: str, stage: str, track: Track) -> Pass:
    instance(name, spelling, str, f"a pass of the stage {stage!r} as text")
    made = parse_pass(spelling, track=track)
    if made.stage != stage:
        raise ArgumentError(
            f"{made.name} is of the stage {made.stage!r}", where=name, remedy=f"Name a pass of the stage {stage!r}"
        )
    return made
