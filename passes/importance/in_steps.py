"""Criteria made of others: scoring in steps, and the choice among several by divergence on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import Calibration
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of, fork
from fxprune.graph.tensors import as_parameter, get_tensor, require_weights, set_tensor
from fxprune.masking.teacher import DivergenceJudge, foresee_split, split_samples
from fxprune.offload.files import resume_scope
from fxprune.offload.ranks import broadcast_object
from fxprune.pipeline.arguments import argument, refuse
from fxprune.pipeline.contract import Pass, PassCost, PassResult, tracked
from fxprune.pipeline.registry import load_pass, pass_argument
from fxprune.removal.removal import Removal, Scores


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

    importance: Pass | str = argument("l2", "The criterion.", check=pass_argument("importance"))
    select: Pass | str | None = argument(
        None,
        "The selection that follows, with its ratio; None for that of the recipe. In step i of k its ratio is "
        "multiplied by i / k.",
        check=pass_argument("select"),
    )
    compensate: Pass | str | None = argument(
        None, "The fit between steps; None for that of the recipe, if any.", check=pass_argument("compensate")
    )
    steps: int = argument(2, "How often it scores.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _with_part_of_ratio(self._select, 1.0)

    def cost(self, samples: int) -> PassCost:
        inner = [step.cost(samples) for step in (self.importance, self.compensate) if isinstance(step, Pass)]
        largest = max(inner, key=lambda cost: cost.batch)
        return replace(largest, runs=self.steps * sum(cost.runs for cost in inner))

    def requires(self, graph_module: fx.GraphModule) -> None:
        super().requires(graph_module)
        facts = facts_of(graph_module)
        for step in (self.importance, self._select, self.compensate):
            for kind in step.needs if isinstance(step, Pass) else ():
                if kind not in (Scores, Removal) and kind not in facts:
                    raise facts.missing(kind, where=f"pass {self.name}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(self.importance, Pass)
        fit = self.compensate if isinstance(self.compensate, Pass) else None
        work, gone = fork(graph_module), None
        for step in tracked(range(1, self.steps + 1), self.name, self.steps):
            with resume_scope(f"step-{step}"):
                self.importance(work)
                scores = _below_others(facts_of(work)[Scores], gone)
                facts_of(work).put(scores)
                if step < self.steps:
                    _with_part_of_ratio(self._select, step / self.steps)(work)
                    gone = facts_of(work)[Removal]
                    work = _zeroed_and_fitted(graph_module, gone, fit)
        facts_of(graph_module).put(replace(scores, source=str(self)))
        return PassResult(graph_module, False)

    @property
    def _select(self) -> Pass:
        return _selection(self.select)


def _selection(given: Any) -> Pass:
    return given if isinstance(given, Pass) else load_pass("select-by-ratio")


def _criteria(name: str, value: Any) -> tuple[Pass, ...]:
    if isinstance(value, str | Pass) or not isinstance(value, Sequence) or len(value) < 2:
        raise refuse(name, value, "two or more passes of the stage 'importance', or their spellings")
    return tuple(pass_argument("importance")(name, one) for one in value)


@dataclass(frozen=True, eq=False)
class ChooseScoresPass(Pass):
    """Scores by several criteria, and keeps the scores whose selection harms the model least.

    The selection by each criterion is carried out as a mask, and the masked model compared with the dense one on
    held-out calibration samples, by the divergence of their predictions. No criterion is the best for all families of
    models, and no fit makes up for a bad one.
    """

    name: ClassVar[str] = "choose-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Calibration, Runnable)
    preconditions = (require_weights,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    criteria: tuple[Pass, ...] = argument(
        ("wanda{readers_only}", "taylor{order=second}"), "The criteria, two or more.", check=_criteria
    )
    select: Pass | str | None = argument(
        None, "The selection that follows, with its ratio; None for that of the recipe.", check=pass_argument("select")
    )
    heldout: int = argument(16, "Most samples to compare on, of at most a third; the criteria see the others.", least=1)
    batch: int = argument(4, "Samples that run at once.", least=1)

    def cost(self, samples: int) -> PassCost:
        inner = [step.cost(samples) for step in self.criteria]
        held = min(self.heldout, samples // 3 or 1)
        choice = _selection(self.select).cost(samples).runs
        runs = sum(cost.runs + choice for cost in inner) + (1 + len(inner)) * held
        return replace(max(inner, key=lambda cost: cost.batch), runs=runs)

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        super().foresee(graph_module, given)
        foresee_split(graph_module, given, None, self.heldout)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        select = _selection(self.select)
        samples, heldout = split_samples(graph_module, None, self.heldout)
        judge = DivergenceJudge(graph_module, heldout, self.batch)
        found: list[tuple[float, Scores]] = []
        for number, step in enumerate(self.criteria):
            work = fork(graph_module)
            facts_of(work).put(Calibration(samples))
            with resume_scope(f"criterion-{number}"):
                step(work)
            select(work)
            found.append((judge.divergence(facts_of(work)[Removal]), facts_of(work)[Scores]))
        best = broadcast_object(min(range(len(found)), key=lambda i: found[i][0]))
        listed = ", ".join(f"{step} {error:.3f}" for step, (error, _) in zip(self.criteria, found, strict=True))
        add_note(graph_module, f"scored by {self.criteria[best]}; divergence of the masked model in nats: {listed}")
        facts_of(graph_module).put(replace(found[best][1], source=str(self)))
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


def _with_part_of_ratio(select: Pass, part: float) -> Pass:
    named = [f.name for f in fields(select) if f.name in ("ratio", "group_ratio")]  # type: ignore[arg-type]
    if len(named) != 1:
        raise ArgumentError(
            f"{select.name} has no ratio to take in steps", where="select", remedy="Use select-by-ratio"
        )
    ratio: Any = getattr(select, named[0])
    scaled = tuple((kind, value * part) for kind, value in ratio) if isinstance(ratio, tuple) else ratio * part
    return replace(select, **{named[0]: scaled})  # type: ignore[type-var]
