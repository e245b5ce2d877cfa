"""Leave out what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.compat import is_impure
from fxprune.passbase import Pass, PassResult
from fxprune.tensors import weights

__all__ = ["EliminateDeadCodePass"]


@dataclass(eq=False)
class EliminateDeadCodePass(Pass):
    """The graph module holds no node and no tensor that its output does not need; it is linted and recompiled."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[str] = "shrink"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Remove dead nodes, then make the module anew from what is read."""
        changed = graph_module.graph.eliminate_dead_code(is_impure)
        slim = fx.GraphModule(dict(weights(graph_module)), graph_module.graph)
        slim.meta.update(graph_module.meta)
        slim.train(graph_module.training)
        slim.graph.lint()
        slim.recompile()
        return PassResult(slim, changed)
