"""First half of verification, on the dense graph: what the slim one has to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.dependency import axis_map
from fxprune.passbase import Pass, PassResult
from fxprune.state import state_of
from fxprune.verify import masked_outputs

__all__ = ["RecordExpectedPass"]


@dataclass(eq=False)
class RecordExpectedPass(Pass):
    """The state holds the outputs of the dense graph with the structures of the plan zeroed."""

    name: ClassVar[str] = "record-expected"
    stage: ClassVar[str] = "verify"
    needs: ClassVar[tuple[str, ...]] = ("graph", "keep", "plan", "probe")
    gives: ClassVar[tuple[str, ...]] = ("expected",)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run once with masks."""
        state = state_of(graph_module)
        assert state.graph is not None and state.keep is not None and state.plan is not None
        assert state.probe is not None
        blocks = state.plan.removed_blocks
        state.expected = masked_outputs(graph_module, axis_map(state.graph), state.keep, blocks, state.probe)
        return PassResult(graph_module, False)
