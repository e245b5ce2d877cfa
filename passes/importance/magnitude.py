"""Criteria that need no data: magnitudes, random numbers, scores of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import fx

from fxprune.discovery.groups import Group, Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.tensors import get_tensor
from fxprune.pipeline.arguments import argument, as_seed, instance, path_or_empty
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Scores

from .base import ImportancePass, Positions, axis_sums

__all__ = ["L1ImportancePass", "L2ImportancePass", "LoadScoresPass", "RandomImportancePass"]


@dataclass(frozen=True, eq=False)
class L1ImportancePass(ImportancePass):
    """Scores slices by the sum of the magnitudes of their weights."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        found = {}
        for name, axis in wanted:
            weight = get_tensor(graph_module, name).detach()
            found[name, axis] = axis_sums(weight.float().abs().pow_(self.power), axis)
        return found


@dataclass(frozen=True, eq=False)
class L2ImportancePass(L1ImportancePass):
    """Scores slices by the sum of the squares of their weights (as in the reference implementation, without root)."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2


@dataclass(frozen=True, eq=False)
class RandomImportancePass(ImportancePass):
    """Scores units uniformly at random in [0, 1)."""

    name: ClassVar[str] = "random"
    seed: int = argument(0, "Random seed.", check=as_seed)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        generator = np.random.default_rng(self.seed)
        shapes = {g.name: (g.outer.size, g.size) if g.outer is not None else (g.size,) for g in groups}
        return Scores({name: generator.random(shape) for name, shape in shapes.items()})


@dataclass(frozen=True, eq=False)
class LoadScoresPass(Pass):
    """Takes existing scores: those of one run serve any ratio, ranking and width."""

    name: ClassVar[str] = "load-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    scores: Scores | None = argument(
        None,
        "Scores, such as ``result.scores``.",
        check=partial(instance, kind=Scores, wanted="scores, such as result.scores", error=PlanError),
        spelled=False,
    )
    file: str = argument(
        "", "In their place, the path of a file written by :meth:`fxprune.Scores.save`.", check=path_or_empty
    )

    def check_arguments(self) -> None:
        self._load()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        scores = self._load()
        scores.check(facts[Groups])
        facts.put(scores)
        return PassResult(graph_module, False)

    def _load(self) -> Scores:
        if self.scores is not None:
            return self.scores
        if self.file:
            return Scores.load(self.file)
        raise PlanError(
            "no scores", where=f"pass {self.name}", remedy="Pass scores, or file with what Scores.save wrote"
        )
