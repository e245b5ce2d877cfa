"""Second half of verification, on the slim graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.dependency import axis_map
from fxprune.passbase import Pass, PassResult
from fxprune.state import state_of
from fxprune.verify import TOLERANCE, compare, find_divergence, require_equal, slim_outputs

__all__ = ["VerifyRemovalPass"]


@dataclass(eq=False)
class VerifyRemovalPass(Pass):
    """The slim graph computes what the dense one does with the same structures zeroed.

    Args:
        dense: the dense graph, to say at which node they part if they do; None where it is gone.
    """

    name: ClassVar[str] = "verify-removal"
    stage: ClassVar[str] = "verify"
    dense: fx.GraphModule | None = None
    needs: ClassVar[tuple[str, ...]] = ("expected", "probe")
    gives: ClassVar[tuple[str, ...]] = ("error",)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run once and compare.

        Raises:
            VerificationError: the outputs differ; says where.
        """
        state = state_of(graph_module)
        assert state.probe is not None
        state.error = compare(state.expected, slim_outputs(graph_module, state.probe))
        if not state.error <= TOLERANCE:
            require_equal(state.error, self._where(graph_module))
        return PassResult(graph_module, False)

    def _where(self, slim: fx.GraphModule) -> str:
        state = state_of(slim)
        if self.dense is None:
            return "the outputs (prune with inplace=False to see the node)"
        assert state.graph is not None and state.keep is not None and state.plan is not None
        assert state.probe is not None
        blocks = state.plan.removed_blocks
        return find_divergence(self.dense, slim, axis_map(state.graph), state.keep, blocks, state.probe)
