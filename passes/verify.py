"""Verification: masking equals shrinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.data.verification import VerificationInputs, check_names, make_inputs
from fxprune.discovery.dependency import Dependencies
from fxprune.graph.facts import Change, Fact, Runnable, Source, add_note, facts_of, fork
from fxprune.graph.tensors import on_meta
from fxprune.masking.compare import (
    TOLERANCE,
    Expected,
    Leaving,
    Verified,
    compare,
    find_divergence,
    masked_by_block,
    masked_outputs,
    require_equal,
    slim_by_block,
    slim_outputs,
)
from fxprune.pipeline.arguments import as_seed, flag
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removal, Removed
from fxprune.trace.inputs import is_hugging_face

__all__ = ["MakeVerificationInputsPass", "RecordExpectedPass", "VerifyRemovalPass"]


@dataclass(frozen=True, eq=False)
class MakeVerificationInputsPass(Pass):
    """Takes the inputs that the model was traced with if the caller gave them, else random ones.

    Args:
        example_inputs: keyword inputs to take instead.
        seed: for random ones; the same seed gives the same inputs.
    """

    name: ClassVar[str] = "make-verification-inputs"
    stage: ClassVar[str] = "prepare"
    changes: ClassVar[Change] = "nothing"
    gives: ClassVar[tuple[type[Fact], ...]] = (VerificationInputs,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    example_inputs: Mapping[str, Any] | None = field(default=None, metadata={"spelled": False})
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no seed, and what is no inputs by name."""
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        check_names(self.example_inputs)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the inputs."""
        facts = facts_of(graph_module)
        source = facts.get(Source)
        given = self.example_inputs
        if given is None and source is not None:
            given = source.example_inputs
        facts.put(VerificationInputs(make_inputs(graph_module, given, self.seed)))
        return PassResult(graph_module, False)


@dataclass(frozen=True, eq=False)
class RecordExpectedPass(Pass):
    """Runs the dense graph with the structures that go zeroed, and puts down its outputs.

    Args:
        by_block: put down what leaves each block as well: every block of the slim graph is then compared on the same
            inputs, and the report says in which one the difference is largest.
    """

    name: ClassVar[str] = "record-expected"
    stage: ClassVar[str] = "verify"
    changes: ClassVar[Change] = "nothing"
    carries: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal, VerificationInputs, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    by_block: bool = False

    def __post_init__(self) -> None:
        """Refuse what is neither yes nor no."""
        object.__setattr__(self, "by_block", flag("by_block", self.by_block))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run once with masks; on ``meta`` nothing can be run, which is noted."""
        facts = facts_of(graph_module)
        if on_meta(graph_module):
            add_note(graph_module, "not verified: the weights are on meta")
            facts.put(Expected(None))
            return PassResult(graph_module, False)
        removal, inputs = facts[Removal], facts[VerificationInputs].values
        what = graph_module, removal.axes, removal.keep, removal.removed_blocks, inputs
        outputs, leaving = masked_by_block(*what) if self.by_block else (masked_outputs(*what), {})
        source = facts.get(Source)
        given_up = source is not None and source.shares  # in place, the dense tensors are to be freed
        facts.put(Expected(outputs, None if given_up else fork(graph_module), leaving))
        return PassResult(graph_module, False)


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
