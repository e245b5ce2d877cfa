"""Find what can be removed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.dependency import dependency_graph
from fxprune.groups import find_groups
from fxprune.passbase import Pass, PassResult
from fxprune.state import state_of

__all__ = ["FindGroupsPass"]


@dataclass(eq=False)
class FindGroupsPass(Pass):
    """The state holds the dependency graph and the groups. The graph is not changed."""

    name: ClassVar[str] = "find-groups"
    stage: ClassVar[str] = "discover"
    gives: ClassVar[tuple[str, ...]] = ("graph",)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Solve the axes and propagate from every trigger."""
        state = state_of(graph_module)
        state.graph = dependency_graph(graph_module)
        state.groups = find_groups(state.graph)
        return PassResult(graph_module, False)
