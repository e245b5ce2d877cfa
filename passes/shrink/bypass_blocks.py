"""Go around the blocks that are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Fact, facts_of
from fxprune.masking.compare import Expected
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Bypassed, Removal
from fxprune.removal.scores import Scores

__all__ = ["BypassBlocksPass"]


@dataclass(frozen=True, eq=False)
class BypassBlocksPass(Pass):
    """Lets what came out of a removed block be what went in. The block's code is dead then, but still there."""

    name: ClassVar[str] = "bypass-blocks"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal)
    gives: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal, Dependencies, Groups, Scores)
    keeps: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace each removed block's output by its input.

        Raises:
            PlanError: the removal was decided on another graph.
        """
        facts = facts_of(graph_module)
        removal, axes = facts[Removal], facts[Dependencies].axes
        if removal.axes is not axes:
            raise PlanError(
                "the removal was decided on another graph",
                where=f"pass {self.name}",
                remedy="Decide on this one, or carry the plan over as text with plan-from-json",
            )
        nodes = {node.name: node for node in graph_module.graph.nodes}
        order = {name: i for i, name in enumerate(nodes)}
        bypasses = [axes.bypasses[block] for block in removal.removed_blocks]
        # last block first: the input of a block may be the output of another one that goes
        for bypass in sorted(bypasses, key=lambda bypass: -order[bypass.target]):
            nodes[bypass.target].replace_all_uses_with(nodes[bypass.source])
        facts.put(Bypassed(removal))
        return PassResult(graph_module, bool(bypasses))
