"""Rewrite the numbers in the graph that are sizes of axes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.axes import kept_size
from fxprune.dependency import axis_map
from fxprune.literals import read_literal, set_literal
from fxprune.passbase import Pass, PassResult
from fxprune.state import state_of

__all__ = ["RewriteLiteralsPass"]


@dataclass(eq=False)
class RewriteLiteralsPass(Pass):
    """View sizes, slice bounds, split sizes, normalised shapes, repeat counts and group counts fit the slim axes.

    A size computed at run time that has a pruned part (batch times heads) is scaled by new over old.
    """

    name: ClassVar[str] = "rewrite-literals"
    stage: ClassVar[str] = "shrink"
    needs: ClassVar[tuple[str, ...]] = ("graph", "keep")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite what changed."""
        state = state_of(graph_module)
        assert state.graph is not None and state.keep is not None
        nodes = {node.name: node for node in graph_module.graph.nodes}
        changed = False
        for literal in axis_map(state.graph).literals:
            node = nodes.get(literal.node)
            old, new = literal.expr.size, kept_size(literal.expr, state.keep)
            if node is None or old == new:
                continue
            current = read_literal(node, literal.path)
            if current == -1:
                continue
            dynamic = isinstance(current, fx.Node)
            size = _scaled(node, current, old, new) if dynamic else new + literal.offset
            set_literal(node, literal.path, size)
            changed = True
        return PassResult(graph_module, changed)


def _scaled(node: fx.Node, size: fx.Node, old: int, new: int) -> fx.Node:
    graph = node.graph
    with graph.inserting_before(node):
        return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (size, new)), old))
