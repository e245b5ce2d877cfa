"""Shrinking: blocks bypassed, literals rewritten, dead code eliminated."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.axes import kept_size
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.compat import is_impure
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import delete_tensor, read_argument, set_argument, weights
from fxprune.masking.compare import Expected, Verified
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import PassSequence
from fxprune.removal.removal import Bypassed, Removal, Removed, Sliced, scaled_numbers
from fxprune.removal.scores import Scores

from .propagate_shapes import PropagateShapesPass
from .slice_parameters import SliceParametersPass

__all__ = ["BypassBlocksPass", "EliminateDeadCodePass", "RewriteLiteralsPass", "ShrinkPass"]


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


@dataclass(frozen=True, eq=False)
class ShrinkPass(PassSequence):
    """Goes around blocks, cuts tensors, makes the sizes in the graph fit, and leaves out what nothing uses."""

    name: ClassVar[str] = "shrink"
    stage: ClassVar[str] = "shrink"

    @property
    def steps(self) -> tuple[Pass, ...]:
        """The passes, in the one order that works."""
        return (
            BypassBlocksPass(),
            EliminateDeadCodePass(),
            SliceParametersPass(),
            RewriteLiteralsPass(),
            PropagateShapesPass(),
            EliminateDeadCodePass(),
        )
