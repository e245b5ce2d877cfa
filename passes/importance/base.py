"""What importance passes share: which groups to score, and what is done with scores per row and column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxprune.data.ranks import of_first
from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds
from fxprune.errors import PassError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.shelf import recalled, remembering
from fxprune.pipeline.arguments import one_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.reductions import REDUCTIONS
from fxprune.removal.scores import Scores, score_groups

__all__ = ["ImportancePass", "axis_sums"]

_FILE = "scores.safetensors"
"""Where a run that may be stopped keeps its scores."""


@dataclass(frozen=True, eq=False)
class ImportancePass(Pass):
    """Scores every unit of the groups of ``kinds``.

    Args:
        kinds: kinds of groups to score.
        reduction: how the scores of the members of a group make one.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    reduction: str = "sum"

    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done; one kind may stand alone."""
        object.__setattr__(self, "kinds", as_kinds(self.kinds))
        one_of("reduction", self.reduction, REDUCTIONS)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Score; the graph is not changed."""
        facts = facts_of(graph_module)
        known = recalled(_FILE)
        if known is not None:
            facts.put(Scores.load(known))
            return PassResult(graph_module, False)
        scores = replace(of_first(self.score(graph_module, facts[Groups].of_kinds(self.kinds))), source=str(self))
        with remembering(_FILE) as file:
            if file is not None:
                scores.save(file)
        facts.put(scores)
        return PassResult(graph_module, False)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """Scores of ``groups``, from scores per position of each member axis."""
        wanted = {(m.name, m.axis): None for group in groups for m in group.parameters}
        return score_groups(groups, self.positions(graph_module, tuple(wanted)), self.reduction)

    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """For each wanted ``(parameter, axis)`` one score per position along the axis.

        A criterion that scores units as a whole writes :meth:`score` in place of this.

        Raises:
            PassError: it writes neither.
        """
        raise PassError(
            "it scores nothing", where=f"pass {self.name}", remedy="Write `positions`, or `score` for units as a whole"
        )


def axis_sums(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all axes but ``axis``: ``(value.shape[axis],)``."""
    others = [i for i in range(value.dim()) if i != axis]
    return value.sum(dim=others) if others else value
