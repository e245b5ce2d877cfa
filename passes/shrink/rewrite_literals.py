"""Rewrite the numbers in the graph that are sizes of axes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.axes import kept_size
from fxprune.graph.arguments import read_argument, set_argument
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.masking.compare import Expected
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.norms import scaled_numbers
from fxprune.removal.removal import Removed, Sliced

__all__ = ["RewriteLiteralsPass"]


@dataclass(frozen=True, eq=False)
class RewriteLiteralsPass(Pass):
    """Makes view sizes, slice bounds, split sizes, normalised shapes, repeat and group counts fit the slim axes.

    A size computed at run time that has a pruned part (batch times heads) is scaled by new over old. What is added to
    an average is multiplied by old over new where a norm is kept as masking has it.
    """

    name: ClassVar[str] = "rewrite-literals"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removed, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    keeps: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite what changed."""
        facts = facts_of(graph_module)
        removal = facts[Sliced].removal
        nodes = {node.name: node for node in graph_module.graph.nodes}
        changed = False
        for literal in removal.axes.size_arguments:
            node = nodes.get(literal.node)
            old, new = literal.expr.size, kept_size(literal.expr, removal.keep)
            if node is None or old == new:
                continue
            current = read_argument(node, literal.path)
            if current == -1:
                continue
            dynamic = isinstance(current, fx.Node)
            size = _scaled(node, current, old, new) if dynamic else new + literal.offset
            set_argument(node, literal.path, size)
            changed = True
        for (name, path), number in scaled_numbers(removal.axes, removal.keep).items():
            if name in nodes:
                set_argument(nodes[name], path, number.after)
                changed = True
        facts.put(Removed(removal))
        facts.put(Runnable())
        graph_module.recompile()
        return PassResult(graph_module, changed)


def _scaled(node: fx.Node, size: fx.Node, old: int, new: int) -> fx.Node:
    graph = node.graph
    with graph.inserting_before(node):
        return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (size, new)), old))
