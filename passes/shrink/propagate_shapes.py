"""Work out the shape of every value again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.compat import FakeTensorProp, fake_mode
from fxprune.passbase import Pass, PassResult

__all__ = ["PropagateShapesPass"]


@dataclass(eq=False)
class PropagateShapesPass(Pass):
    """``node.meta["val"]`` is what the slim graph computes, symbolic where the dense one's is.

    A shape that does not fit shows here, at the node where it arises, before anything is run.
    """

    name: ClassVar[str] = "propagate-shapes"
    stage: ClassVar[str] = "shrink"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the graph on fake tensors."""
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), None) or fake_mode()
        mode.allow_non_fake_inputs = True
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)
        return PassResult(graph_module, False)
