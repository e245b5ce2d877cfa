"""What importance passes share: which groups to score, and what is done with scores per row and column."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.errors import UnknownNameError
from fxprune.groups import Group, check_kinds
from fxprune.passbase import Pass, PassResult
from fxprune.scores import REDUCTIONS, Scores, score_groups
from fxprune.state import state_of

__all__ = ["ImportancePass", "axis_sums"]


@dataclass(eq=False)
class ImportancePass(Pass):
    """Scores every unit of the groups of ``kinds``.

    Args:
        kinds: kinds of groups to score.
        reduction: how the scores of the members of a group make one.
    """

    kinds: tuple[str, ...] = ("mlp", "head")
    reduction: str = "sum"

    stage: ClassVar[str] = "importance"
    needs: ClassVar[tuple[str, ...]] = ("graph",)
    gives: ClassVar[tuple[str, ...]] = ("scores",)

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done."""
        if self.reduction not in REDUCTIONS:
            raise UnknownNameError("reduction", self.reduction, REDUCTIONS)
        check_kinds(self.kinds)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Score; the graph is not changed."""
        state = state_of(graph_module)
        groups = tuple(group for group in state.groups if group.kind in self.kinds)
        state.scores = self.score(graph_module, groups)
        return PassResult(graph_module, False)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """Scores of ``groups``, from scores per position of each member axis."""
        wanted = {(m.name, m.axis): None for group in groups for m in group.parameters}
        return score_groups(groups, self.positions(graph_module, tuple(wanted)), self.reduction)

    @abstractmethod
    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """For each wanted ``(parameter, axis)`` one score per position along the axis."""


def axis_sums(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all axes but ``axis``: ``(value.shape[axis],)``."""
    others = [i for i in range(value.dim()) if i != axis]
    return value.sum(dim=others) if others else value
