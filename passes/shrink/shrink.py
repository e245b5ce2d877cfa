"""Shrinking: blocks bypassed, literals rewritten, dead code eliminated."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.axes import kept_size
from fxprune.data.verification import VerificationInputs
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.compat import is_impure
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import delete_tensor, read_argument, set_argument, weights
from fxprune.masking.compare import Verified
from fxprune.offload.prefetch import use_prefetcher
from fxprune.pipeline.arguments import argument, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import PassSequence
from fxprune.removal.budget import cache_size
from fxprune.removal.removal import Bypassed, Removal, Removed, Sliced, scaled_numbers
from fxprune.removal.scores import Scores

from .propagate_shapes import PropagateShapesPass
from .slice_parameters import SliceParametersPass
from .verify import record_masked_outputs, verify_removal

__all__ = ["BypassBlocksPass", "EliminateDeadCodePass", "RewriteLiteralsPass", "ShrinkPass"]


@dataclass(frozen=True, eq=False)
class BypassBlocksPass(Pass):
    """Replaces each removed block by the identity. Its code is dead then, and goes with eliminate-dead-code."""

    name: ClassVar[str] = "bypass-blocks"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal)
    gives: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal, Dependencies, Groups, Scores)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
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
        # last block first: the input of a block may be the output of another removed one
        for bypass in sorted(bypasses, key=lambda bypass: -order[bypass.target]):
            nodes[bypass.target].replace_all_uses_with(nodes[bypass.source])
        facts.put(Bypassed(removal))
        return PassResult(graph_module, bool(bypasses))


@dataclass(frozen=True, eq=False)
class RewriteLiteralsPass(Pass):
    """Rewrites view sizes, slice bounds, split sizes, normalised shapes, repeat and group counts to the slim axes.

    A size computed at run time that has a pruned part (batch times heads) is scaled by new over old. The epsilon added
    to an average is multiplied by old over new in a norm that is kept as in the masked model.
    """

    name: ClassVar[str] = "rewrite-literals"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removed, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Sliced,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
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
            if isinstance(current, fx.Node):
                graph = node.graph
                with graph.inserting_before(node):
                    product = graph.call_function(operator.mul, (current, new))
                    size = graph.call_function(operator.floordiv, (product, old))
            else:
                size = new + literal.offset
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


@dataclass(frozen=True, eq=False)
class EliminateDeadCodePass(Pass):
    """Removes every node and tensor that the output does not need; the graph is linted and recompiled."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    keeps: ClassVar[tuple[type[Fact], ...]] = (Verified,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = graph_module.graph.eliminate_dead_code(is_impure)
        read = {name for name, _ in weights(graph_module)}
        parameters = graph_module.named_parameters(remove_duplicate=False)
        held = [name for name, _ in (*parameters, *graph_module.named_buffers(remove_duplicate=False))]
        for name in held:
            if name not in read:
                delete_tensor(graph_module, name)
                changed = True
        graph_module.delete_all_unused_submodules()
        if changed:  # an unchanged graph has been linted before
            graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, changed)


@dataclass(frozen=True, eq=False)
class ShrinkPass(PassSequence):
    """Carries out a removal: blocks are bypassed, tensors cut, literals rewritten, and dead code eliminated.

    With ``verify`` the outputs of the masked dense graph are recorded before, and the slim graph is compared after.
    """

    name: ClassVar[str] = "shrink"
    stage: ClassVar[str] = "shrink"

    verify: bool = argument(False, "Check that the slim graph equals the dense one with the same structures zeroed.")
    by_block: bool = argument(
        False, "Compare every block of the slim graph on the masked inputs of its own, and report the worst."
    )
    seed: int = argument(0, "Seed of random verification inputs.", check=as_seed)

    @property
    def steps(self) -> tuple[Pass, ...]:
        return (
            BypassBlocksPass(),
            EliminateDeadCodePass(),
            SliceParametersPass(),
            RewriteLiteralsPass(),
            PropagateShapesPass(),
            EliminateDeadCodePass(),
        )

    @property
    def gives(self) -> tuple[type[Fact], ...]:  # type: ignore[override]
        return (*super().gives, VerificationInputs, Verified) if self.verify else super().gives

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        cache, expected = cache_size(graph_module, facts_of(graph_module)[Removal]), None
        if self.verify:
            with use_prefetcher(True):
                expected = record_masked_outputs(graph_module, by_block=self.by_block, seed=self.seed)
        result = super().call(graph_module)
        facts = facts_of(result.graph_module)
        if cache is not None:
            facts.put(cache)
        if expected is not None:
            with use_prefetcher(True):
                facts.put(verify_removal(result.graph_module, expected))
        return result
