"""Verification: the slim graph computes what the dense one does with the removed structures zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxprune.data.verification import VerificationInputs, make_inputs
from fxprune.graph.facts import Source, add_note, facts_of, fork
from fxprune.graph.tensors import has_meta_weights
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
from fxprune.removal.removal import Removal, Removed
from fxprune.trace.inputs import is_hugging_face

__all__ = ["MaskedOutputs", "record_masked_outputs", "verify_removal"]


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
    if has_meta_weights(graph_module):
        add_note(graph_module, "not verified: the weights are on meta")
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
