"""Count parameters and multiply-accumulates before anything goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.errors import PassError
from fxprune.graph.counting import TOKENS, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import Change, Fact, Runnable, facts_of
from fxprune.graph.source import Source
from fxprune.masking.masked_run import UntouchedRun
from fxprune.pipeline.arguments import whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.budget import make_budget
from fxprune.removal.removal import Removal
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
        facts = facts_of(graph_module)
        work = Work(
            parameters=count_parameters(graph_module),
            macs=count_macs(graph_module, self.tokens, UntouchedRun),
            tokens=self.tokens,
            memory=count_bytes(graph_module),
            cache=_cache(graph_module, facts.get(Removal)),
            model=_name_of(facts.get(Source)),
        )
        facts.put(work)
        return PassResult(graph_module, False)


def _cache(graph_module: fx.GraphModule, removal: Removal | None) -> tuple[int, int] | None:
    """Bytes of keys and values that a token takes, before and after the removal that is decided."""
    if removal is None:
        return None
    try:
        budget = make_budget("kv", graph_module, removal.axes)
    except PassError:
        return None  # no attention
    counts = {factor: float(removal.keep.count(factor)) for factor in removal.keep.units}
    gone = budget.removed(counts, dict.fromkeys(removal.removed_blocks, 1.0))
    return budget.total, round(budget.total - gone)


def _name_of(source: Source | None) -> str:
    """What the model is called: its name on a hub or that of its folder, and its class."""
    if source is None:
        return ""
    name = str(getattr(getattr(source.model, "config", None), "_name_or_path", "") or "")
    kind = type(source.model).__name__
    return f"{name.rstrip('/').rpartition('/')[2]} ({kind})" if name else kind
