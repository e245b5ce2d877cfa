"""Go around the blocks that are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.dependency import axis_map
from fxprune.passbase import Pass, PassResult
from fxprune.state import state_of

__all__ = ["BypassBlocksPass"]


@dataclass(eq=False)
class BypassBlocksPass(Pass):
    """What came out of a removed block is what went in. The block's code is dead, but still there."""

    name: ClassVar[str] = "bypass-blocks"
    stage: ClassVar[str] = "shrink"
    needs: ClassVar[tuple[str, ...]] = ("graph", "plan")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace each removed block's output by its input."""
        state = state_of(graph_module)
        assert state.graph is not None and state.plan is not None
        nodes = {node.name: node for node in graph_module.graph.nodes}
        bypasses = [axis_map(state.graph).bypasses[block] for block in state.plan.removed_blocks]
        order = {name: i for i, name in enumerate(nodes)}
        # last block first: the input of a block may be the output of another one that goes
        for bypass in sorted(bypasses, key=lambda bypass: -order[bypass.target]):
            nodes[bypass.target].replace_all_uses_with(nodes[bypass.source])
        return PassResult(graph_module, bool(state.plan.removed_blocks))
