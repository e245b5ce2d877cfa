"""Discovery: groups found in a traced graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.discovery.dependency import Dependencies, dependency_graph
from fxprune.discovery.groups import Groups, find_groups
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.pipeline.arguments import Norm, argument
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

__all__ = ["FindGroupsPass"]


@dataclass(frozen=True, eq=False)
class FindGroupsPass(Pass):
    """Solves the axes, and finds the groups by propagation from every trigger."""

    name: ClassVar[str] = "find-groups"
    stage: ClassVar[str] = "discover"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable, Shaped)
    gives: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups)
    drops: ClassVar[tuple[type[Fact], ...]] = (Scores, Removal)

    norm: Norm = argument(
        "sliced",
        """A norm over units of which some go: ``sliced``, statistics of those that stay; ``masked``, what the dense
        norm computes with the others zeroed, where a root mean square and a weight of its own allow that.""",
    )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts, graph = facts_of(graph_module), dependency_graph(graph_module, self.norm)
        facts.put(Dependencies(graph))
        facts.put(Groups(find_groups(graph)))
        return PassResult(graph_module, False)
