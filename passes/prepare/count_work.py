"""Count parameters and multiply-accumulates before anything goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.graph.counting import TOKENS, count_macs, count_parameters
from fxprune.graph.facts import Change, Fact, Runnable, facts_of
from fxprune.masking.masked_run import UntouchedRun
from fxprune.pipeline.arguments import whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.report import Work

__all__ = ["CountWorkPass"]


@dataclass(frozen=True, eq=False)
class CountWorkPass(Pass):
    """Counts the parameters of the graph and the multiply-accumulates of a sample, for the report.

    Args:
        tokens: length of the sample.
    """

    name: ClassVar[str] = "count-work"
    stage: ClassVar[str] = "prepare"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Work,)

    tokens: int = TOKENS

    def __post_init__(self) -> None:
        """Refuse what is no length."""
        object.__setattr__(self, "tokens", whole_number("tokens", self.tokens, least=1))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Count without running anything."""
        work = Work(count_parameters(graph_module), count_macs(graph_module, self.tokens, UntouchedRun), self.tokens)
        facts_of(graph_module).put(work)
        return PassResult(graph_module, False)
