"""Criteria made of others: scoring in steps, and products of the scores of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Calibration
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError, PassError
from fxprune.graph.facts import Change, Fact, Runnable, facts_of, fork, within
from fxprune.graph.tensors import as_parameter, get_tensor, require_weights, set_tensor
from fxprune.masking.masked_run import masked_weight
from fxprune.offload.files import resume_scope
from fxprune.pipeline.arguments import argument, refuse
from fxprune.pipeline.contract import Pass, PassCost, PassResult, tracked
from fxprune.pipeline.registry import load_pass, pass_argument
from fxprune.removal.removal import Array, Removal, Scores


@dataclass(frozen=True, eq=False)
class ScoreInStepsPass(Pass):
    """Scores, removes a part of the ratio, fits the rest, and scores again, in several steps.

    Units removed in a step are zero in the graph that the next one scores, which computes the same as the slim graph
    would. Their scores are set below all others, so that a selection with the whole ratio by the scores of the last
    step removes all of them.

    Source: iterative pruning as in Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference" (arXiv 1611.06440), section 2, with a fit in place of training.
    """

    name: ClassVar[str] = "score-in-steps"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Runnable)
    preconditions = (require_weights,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    importance: Pass = argument("l2", "The criterion.", check=pass_argument("importance"))
    select: Pass | None = argument(
        None,
        "The selection that follows, with its ratio or target; None for the recipe's. In step i of k it removes i / k "
        "of that.",
        check=pass_argument("select"),
    )
    compensate: Pass | None = argument(
        None, "The fit between steps; None for the recipe's, if any.", check=pass_argument("compensate")
    )
    steps: int = argument(2, "How many times units are scored.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _with_part_of_ratio(self._select, 1.0)

    def cost(self, samples: int) -> PassCost:
        inner = [step.cost(samples) for step in (self.importance, self.compensate) if step is not None]
        largest = max(inner, key=lambda cost: cost.batch)
        return replace(largest, runs=self.steps * sum(cost.runs for cost in inner))

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        facts = facts_of(graph_module)
        for step in (self.importance, self._select, self.compensate):
            for kind in () if step is None else step.needs:
                if kind not in (Scores, Removal) and kind not in facts:
                    raise facts.missing(kind, where=f"pass {self.name}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        work, gone = fork(graph_module), None
        by_ratio = getattr(self._select, "without_target", None)
        select = self._select if by_ratio is None else by_ratio(graph_module)
        for step in tracked(range(1, self.steps + 1), self.name, self.steps):
            with resume_scope(f"step-{step}"):
                self.importance(work)
                scores = _below_others(facts_of(work)[Scores], gone)
                facts_of(work).put(scores)
                if step < self.steps:
                    _with_part_of_ratio(select, step / self.steps)(work)
                    gone = facts_of(work)[Removal]
                    work = _zeroed_and_fitted(graph_module, gone, self.compensate)
        facts_of(graph_module).put(replace(scores, source=str(self)))
        return PassResult(graph_module, False)

    @property
    def _select(self) -> Pass:
        return load_pass("select-by-ratio") if self.select is None else self.select


def _criteria(name: str, value: Any) -> tuple[Pass, ...]:
    if isinstance(value, str | Pass) or not isinstance(value, Sequence) or len(value) < 2:
        raise refuse(name, value, "two or more passes of the stage 'importance', or their spellings")
    return tuple(pass_argument("importance")(name, one) for one in value)


@dataclass(frozen=True, eq=False)
class MultiplyScoresPass(Pass):
    """Scores by several criteria, and multiplies the scores of each unit.

    A unit goes where all of them say that it matters little; what one criterion gets wrong, the others put right. No
    criterion is the best for all families of models, and no fit makes up for a bad one.
    """

    name: ClassVar[str] = "multiply-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Runnable)
    wants: ClassVar[tuple[type[Fact], ...]] = (Calibration,)
    preconditions = (require_weights,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    criteria: tuple[Pass, ...] = argument(
        ("wanda{readers_only}", "taylor{order=second}"), "The criteria, two or more.", check=_criteria
    )

    def cost(self, samples: int) -> PassCost:
        inner = [step.cost(samples) for step in self.criteria]
        return replace(max(inner, key=lambda cost: cost.batch), runs=sum(cost.runs for cost in inner))

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        for step in self.criteria:
            step.requires(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found: list[Mapping[str, Array]] = []
        for number, step in enumerate(self.criteria):
            work = fork(graph_module)
            with resume_scope(f"criterion-{number}"):
                step(work)
            found.append(facts_of(work)[Scores].units)
            if any((row < 0).any() for row in found[-1].values()):
                what, remedy = "some of its scores are below zero, and cannot be multiplied", "Choose other criteria"
                raise PassError(what, where=f"pass {step.name}", remedy=remedy)
        every = [name for name in found[0] if all(name in units for units in found)]
        units = {name: np.prod([units[name] for units in found], axis=0) for name in every}
        facts_of(graph_module).put(Scores(units, str(self)))
        return PassResult(graph_module, False)


def _below_others(scores: Scores, gone: Removal | None) -> Scores:
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


def _zeroed_and_fitted(graph_module: fx.GraphModule, gone: Removal, fit: Pass | None) -> fx.GraphModule:
    """A copy of a graph with the removed units zeroed and the weights fitted."""
    work = fork(graph_module)
    if fit is not None:
        facts_of(work).put(gone)
        work = fit(work, inplace=True).graph_module
    plan = gone.plan
    with torch.no_grad():
        for name in plan.kept:
            tensor = get_tensor(work, name)
            value = masked_weight(tensor.detach(), gone.axes.tensors[name], gone.keep)
            set_tensor(work, name, as_parameter(value, tensor))
        for name in gone.axes.parameters:
            if within(name, plan.removed_blocks):
                tensor = get_tensor(work, name)
                set_tensor(work, name, as_parameter(torch.zeros_like(tensor), tensor))
    return work


def _with_part_of_ratio(select: Pass, part: float) -> Pass:
    named = [f.name for f in fields(select) if f.name in ("ratio", "group_ratio")]  # type: ignore[arg-type]
    if len(named) != 1:
        raise ArgumentError(
            f"{select.name} has no ratio to take in steps", where="select", remedy="Use select-by-ratio"
        )
    ratio: Any = getattr(select, named[0])
    scaled = tuple((kind, value * part) for kind, value in ratio) if isinstance(ratio, tuple) else ratio * part
    return replace(select, **{named[0]: scaled})  # type: ignore[type-var]
