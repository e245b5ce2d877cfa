"""Second half of verification, on the slim graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxprune.data.verification import VerificationInputs
from fxprune.graph.facts import Change, Fact, Runnable, facts_of
from fxprune.graph.source import Source
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
        """Run once and compare.

        Raises:
            VerificationError: the outputs differ; says where.
        """
        facts = facts_of(graph_module)
        expected = facts[Expected]
        error = None
        if expected.outputs is not None:
            error = compare(expected.outputs, slim_outputs(graph_module, facts[VerificationInputs].values))
            if not error <= TOLERANCE:
                require_equal(error, self._where(graph_module, expected.dense))
        facts.put(replace(expected, dense=None))  # what it was kept for is over
        facts.put(Verified(error))
        source = facts.get(Source)
        if source is not None and source.cut and is_hugging_face(source.model):
            facts.put(replace(source, cut=()))  # so is this; the code of another module is not checked yet
        return PassResult(graph_module, False)

    def _where(self, slim: fx.GraphModule, dense: fx.GraphModule | None) -> str:
        if dense is None:
            return "the outputs (prune with inplace=False to see the node)"
        facts = facts_of(slim)
        removal, inputs = facts[Removed].removal, facts[VerificationInputs].values
        return find_divergence(dense, slim, removal.axes, removal.keep, removal.removed_blocks, inputs)
