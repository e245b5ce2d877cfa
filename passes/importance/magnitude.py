"""Criteria that need no data: magnitudes, random numbers, scores of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.discovery.groups import Group, Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.tensors import get_tensor
from fxprune.pipeline.arguments import as_path, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.scores import Scores

from .base import ImportancePass, axis_sums

__all__ = ["L1ImportancePass", "L2ImportancePass", "LoadScoresPass", "RandomImportancePass"]


@dataclass(frozen=True, eq=False)
class _MagnitudePass(ImportancePass):
    power: ClassVar[int]

    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """``sum |w| ** power`` over each slice."""
        found = {}
        for name, axis in wanted:
            weight = get_tensor(graph_module, name).detach()
            found[name, axis] = axis_sums(weight.float().abs().pow_(self.power), axis)
        return found


@dataclass(frozen=True, eq=False)
class L1ImportancePass(_MagnitudePass):
    """A slice is worth the sum of the magnitudes of its weights."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1


@dataclass(frozen=True, eq=False)
class L2ImportancePass(_MagnitudePass):
    """A slice is worth the sum of the squares of its weights (as in the reference implementation, without root)."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2


@dataclass(frozen=True, eq=False)
class RandomImportancePass(ImportancePass):
    """Units are scored uniformly at random in [0, 1).

    Args:
        seed: the same seed gives the same scores.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no seed."""
        super().__post_init__()
        object.__setattr__(self, "seed", as_seed("seed", self.seed))

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """One number for each unit, in the order of ``groups``."""
        generator = np.random.default_rng(self.seed)
        shapes = {g.name: (g.outer.size, g.size) if g.outer is not None else (g.size,) for g in groups}
        return Scores({name: generator.random(shape) for name, shape in shapes.items()})


@dataclass(frozen=True, eq=False)
class LoadScoresPass(Pass):
    """Takes scores that are there already: those of one run serve any ratio, ranking and width.

    Args:
        scores: such as ``result.scores``.
        file: in their place, the path of a file that :meth:`fxprune.Scores.save` wrote.
    """

    name: ClassVar[str] = "load-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    scores: Scores | None = field(default=None, metadata={"spelled": False})
    file: str = ""

    def check_arguments(self) -> None:
        """Raise where there are no scores.

        Raises:
            PlanError: there are none, or the file cannot be read.
        """
        self._scores()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the scores.

        Raises:
            PlanError: they are those of another model.
        """
        facts = facts_of(graph_module)
        scores = self._scores()
        scores.check(facts[Groups])
        facts.put(scores)
        return PassResult(graph_module, False)

    def _scores(self) -> Scores:
        if self.scores is None and self.file:
            return Scores.load(as_path("file", self.file))
        if isinstance(self.scores, Scores):
            return self.scores
        raise PlanError(
            "no scores", where=f"pass {self.name}", remedy="Pass scores, or file with what Scores.save wrote"
        )
