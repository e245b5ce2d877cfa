"""First half of verification, on the dense graph: what the slim one has to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.data.verification import VerificationInputs
from fxprune.discovery.dependency import Dependencies
from fxprune.graph.facts import Change, Fact, Runnable, add_note, facts_of
from fxprune.graph.fork import fork
from fxprune.graph.source import Source
from fxprune.graph.tensors import on_meta
from fxprune.masking.by_block import masked_by_block
from fxprune.masking.compare import Expected, masked_outputs
from fxprune.pipeline.arguments import flag
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Removal

__all__ = ["RecordExpectedPass"]


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
