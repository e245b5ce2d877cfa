"""Work out the shape of every value again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.graph.compat import FakeTensorProp, enable_python_dispatcher, fake_mode, tree_leaves
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.graph.inputs import example_of
from fxprune.graph.tensors import device_of
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["PropagateShapesPass"]


@dataclass(frozen=True, eq=False)
class PropagateShapesPass(Pass):
    """Works out ``node.meta["val"]`` of every node again, symbolic where it was.

    A shape that does not fit shows here, at the node where it arises, before anything is run.
    """

    name: ClassVar[str] = "propagate-shapes"
    stage: ClassVar[str] = "shrink"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Shaped,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the graph on fake tensors."""
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = tree_leaves(inputs)
        mode = next((value.fake_mode for value in leaves if hasattr(value, "fake_mode")), None) or fake_mode()
        mode.allow_non_fake_inputs = True
        device = device_of(graph_module)
        with mode:
            inputs = [example_of(v, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device)) for v in inputs]
        with enable_python_dispatcher():  # symbolic sizes are only understood by the Python side of torch's dispatcher
            _Shapes(graph_module, mode).propagate_dont_convert_inputs(*inputs)
        facts_of(graph_module).put(Shaped())
        return PassResult(graph_module, False)


class _Shapes(FakeTensorProp):
    """Reads weights as fake tensors, so that an op that writes to one does not write to the real one."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight without its values."""
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
