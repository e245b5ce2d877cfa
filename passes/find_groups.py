"""Discovery: groups found in a traced graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.discovery.dependency import Dependencies, dependency_graph
from fxprune.discovery.groups import Groups, find_groups
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.masking.compare import Expected
from fxprune.pipeline.arguments import NORMS, one_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

__all__ = ["FindGroupsPass"]


@dataclass(frozen=True, eq=False)
class FindGroupsPass(Pass):
    """Solves the axes and finds the groups by propagation from every trigger.

    Args:
        norm: what becomes of a norm over units that go: ``sliced``, an average of those that stay; or ``masked``, what
            it is with the others zeroed, where a root mean square and a weight of its own allow that.
    """

    name: ClassVar[str] = "find-groups"
    stage: ClassVar[str] = "discover"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable, Shaped)
    gives: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores, Removal, Expected)

    norm: str = "sliced"

    def __post_init__(self) -> None:
        """Refuse another word."""
        one_of("norm", self.norm, NORMS)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the dependency graph and the groups."""
        facts, graph = facts_of(graph_module), dependency_graph(graph_module, self.norm)
        facts.put(Dependencies(graph))
        facts.put(Groups(find_groups(graph)))
        return PassResult(graph_module, False)
