"""Shrinking: blocks bypassed, literals rewritten, dead code eliminated; and its verification."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.axes import kept_size
from fxprune.data.verification import VerificationInputs, make_inputs
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.compat import is_impure
from fxprune.graph.facts import Fact, Runnable, Source, add_note, facts_of, fork
from fxprune.graph.tensors import delete_tensor, has_meta_weights, read_argument, set_argument, weights
from fxprune.masking.compare import (
    TOLERANCE,
    BlockOutput,
    Verified,
    compare,
    find_divergence,
    masked_by_block,
    masked_outputs,
    require_equal,
    slim_by_block,
    slim_outputs,
)
from fxprune.offload.prefetch import use_prefetcher
from fxprune.pipeline.arguments import argument, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import PassSequence
from fxprune.removal.budget import cache_size
from fxprune.removal.removal import Bypassed, Removal, Removed, Sliced, scaled_numbers
from fxprune.removal.scores import Scores
from fxprune.trace.fidelity import Fidelity
from fxprune.trace.inputs import is_hugging_face

from .propagate_shapes import PropagateShapesPass
from .slice_parameters import SliceParametersPass

__all__ = [
    "BypassBlocksPass",
    "EliminateDeadCodePass",
    "MaskedOutputs",
    "RewriteLiteralsPass",
    "ShrinkPass",
    "record_masked_outputs",
    "verify_removal",
]


@dataclass(frozen=True, eq=False)
class MaskedOutputs:
    """Outputs of the dense graph with the removed structures zeroed, which the slim graph must reproduce.

    Args:
        inputs: keyword inputs of the run.
        outputs: float tensors, in order; None if the weights are on ``meta`` and nothing can be run.
        dense: the dense graph, to locate a difference; None if its tensors are freed as slim ones are made.
        leaving: outputs of each block, by node, where blocks are compared one by one.
    """

    inputs: Mapping[str, Any]
    outputs: tuple[torch.Tensor, ...] | None
    dense: fx.GraphModule | None
    leaving: Mapping[str, BlockOutput]


def record_masked_outputs(graph_module: fx.GraphModule, *, by_block: bool, seed: int) -> MaskedOutputs:
    """Run the dense graph once with masks.

    The inputs are those that the model was traced with if the caller gave them, else random ones from ``seed``; they
    are left as the fact :class:`VerificationInputs`.
    """
    facts = facts_of(graph_module)
    source, removal = facts.get(Source), facts[Removal]
    inputs = make_inputs(graph_module, None if source is None else source.example_inputs, seed)
    facts.put(VerificationInputs(inputs))
    fidelity = facts.get(Fidelity)
    is_random = fidelity is not None and fidelity.random
    if is_random or has_meta_weights(graph_module):
        why = "the module draws random numbers in evaluation" if is_random else "the weights are on meta"
        add_note(graph_module, f"not verified: {why}")
        return MaskedOutputs(inputs, None, None, {})
    run = graph_module, removal.axes, removal.keep, removal.removed_blocks, inputs
    outputs, leaving = masked_by_block(*run) if by_block else (masked_outputs(*run), {})
    frees_dense = source is not None and source.shares
    return MaskedOutputs(inputs, outputs, None if frees_dense else fork(graph_module), leaving)


def verify_removal(graph_module: fx.GraphModule, expected: MaskedOutputs) -> Verified:
    """Run the slim graph once and compare, block by block if the outputs of blocks were recorded."""
    facts = facts_of(graph_module)
    verified = Verified(None)
    if expected.outputs is not None:
        blocks: Mapping[str, float] = {}
        if expected.leaving:
            found, blocks = slim_by_block(graph_module, expected.leaving, expected.inputs, compare)
        else:
            found = slim_outputs(graph_module, expected.inputs)
        error = max(compare(expected.outputs, found), *blocks.values(), 0.0)
        verified = Verified(error, blocks)
        if not error <= TOLERANCE:
            require_equal(error, _where(graph_module, expected, verified))
    if verified.blocks:
        largest = f"{verified.blocks[verified.worst]:.1e} in {verified.worst}"
        add_note(graph_module, f"verified block by block: the largest difference is {largest}")
    source = facts.get(Source)
    if source is not None and source.cut and is_hugging_face(source.model):
        # The pieces cut off were kept to undo a failed removal. The code of other modules is checked only on emission.
        facts.put(replace(source, cut=()))
    return verified


def _where(slim: fx.GraphModule, expected: MaskedOutputs, verified: Verified) -> str:
    first = next((block for block, error in verified.blocks.items() if not error <= TOLERANCE), "")
    if expected.dense is not None:
        removal = facts_of(slim)[Removed].removal
        kept = removal.axes, removal.keep, removal.removed_blocks
        return find_divergence(expected.dense, slim, *kept, expected.inputs)
    return f"{first}, on its masked inputs" if first else "the outputs (prune with $inplace=False to see the node)"


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
