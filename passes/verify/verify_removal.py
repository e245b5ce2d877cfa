"""Second half of verification, on the slim graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxprune.data.verification import VerificationInputs
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.source import Source
from fxprune.masking.by_block import Leaving, slim_by_block
from fxprune.masking.compare import TOLERANCE, Expected, Verified, compare, find_divergence, require_equal, slim_outputs
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removed
from fxprune.trace.inputs import is_hugging_face

__all__ = ["VerifyRemovalPass"]


@dataclass(frozen=True, eq=False)
class VerifyRemovalPass(Pass):
    """Checks that the slim graph computes what the dense one does with the same structures zeroed."""

    name: ClassVar[str] = "verify-removal"
    stage: ClassVar[str] = "verify"
    changes: ClassVar[Change] = "nothing"
    carries: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Fact], ...]] = (Expected, VerificationInputs, Removed, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Verified,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run once and compare; block by block where what leaves the blocks was put down.

        Raises:
            VerificationError: the outputs, or what leaves a block, differ; says where.
        """
        facts = facts_of(graph_module)
        expected = facts[Expected]
        verified = Verified(None)
        if expected.outputs is not None:
            verified = self._compared(graph_module, expected.outputs, expected.leaving)
            if verified.error is not None and not verified.error <= TOLERANCE:
                require_equal(verified.error, self._where(graph_module, expected.dense, verified))
        if verified.blocks:
            told = f"{verified.blocks[verified.worst]:.1e} in {verified.worst}"
            add_note(graph_module, f"verified block by block: the largest difference is {told}")
        facts.put(replace(expected, dense=None, leaving={}))  # what they were kept for is over
        facts.put(verified)
        source = facts.get(Source)
        if source is not None and source.cut and is_hugging_face(source.model):
            facts.put(replace(source, cut=()))  # so is this; the code of another module is not checked yet
        return PassResult(graph_module, False)

    def _compared(
        self, slim: fx.GraphModule, outputs: Sequence[torch.Tensor], leaving: Mapping[str, Leaving]
    ) -> Verified:
        inputs = facts_of(slim)[VerificationInputs].values
        if not leaving:
            return Verified(compare(outputs, slim_outputs(slim, inputs)))
        found, blocks = slim_by_block(slim, leaving, inputs, compare)
        return Verified(max(compare(outputs, found), *blocks.values(), 0.0), blocks)

    def _where(self, slim: fx.GraphModule, dense: fx.GraphModule | None, verified: Verified) -> str:
        first = next((block for block, error in verified.blocks.items() if not error <= TOLERANCE), "")
        if dense is None and first:
            return f"{first}, on the inputs that masking gives it"
        if dense is None:
            return "the outputs (prune with inplace=False to see the node)"
        facts = facts_of(slim)
        removal, inputs = facts[Removed].removal, facts[VerificationInputs].values
        return find_divergence(dense, slim, removal.axes, removal.keep, removal.removed_blocks, inputs)
