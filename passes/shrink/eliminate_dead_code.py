"""Leave out what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.compat import is_impure
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import delete_tensor, weights
from fxprune.masking.compare import Expected, Verified
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["EliminateDeadCodePass"]


@dataclass(frozen=True, eq=False)
class EliminateDeadCodePass(Pass):
    """Takes out every node and tensor that the output does not need; the graph is linted and recompiled."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    keeps: ClassVar[tuple[type[Fact], ...]] = (Expected, Verified)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Remove dead nodes, then the tensors and submodules that no node reads any more."""
        changed = graph_module.graph.eliminate_dead_code(is_impure)
        read = {name for name, _ in weights(graph_module)}
        parameters = graph_module.named_parameters(remove_duplicate=False)
        held = [name for name, _ in (*parameters, *graph_module.named_buffers(remove_duplicate=False))]
        for name in held:
            if name not in read:
                delete_tensor(graph_module, name)
                changed = True
        graph_module.delete_all_unused_submodules()
        if changed:  # one that is as it was has been linted to begin with
            graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, changed)
