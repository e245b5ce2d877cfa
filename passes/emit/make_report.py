"""Report what was done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.emit.emitted import Emitted
from fxprune.graph.counting import count_bytes, count_macs, count_parameters
from fxprune.graph.facts import Change, Fact, Notes, Runnable, facts_of
from fxprune.masking.compare import Verified
from fxprune.masking.masked_run import UntouchedRun
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Ran
from fxprune.removal.norms import kept_in, unkept_in
from fxprune.removal.removal import Removed
from fxprune.removal.report import Report, Work, frozen_reasons, renormalised_in, sizes_of, spreads_of, widths_of
from fxprune.trace.fidelity import Fidelity

__all__ = ["MakeReportPass"]


@dataclass(frozen=True, eq=False)
class MakeReportPass(Pass):
    """Puts sizes before and after, widths, verification and notes into a report."""

    name: ClassVar[str] = "make-report"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Work, Removed, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Report,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the report."""
        facts = facts_of(graph_module)
        work, removal = facts[Work], facts[Removed].removal
        verified, emitted, notes = facts.get(Verified), facts.get(Emitted), facts.get(Notes)
        traced = facts.get(Fidelity) or Fidelity(None)
        groups, keep, blocks = removal.groups, removal.keep, removal.removed_blocks
        renormalised = renormalised_in(groups, keep)
        unkept = unkept_in(removal.axes, dict.fromkeys(node for nodes in renormalised.values() for node in nodes))
        report = Report(
            parameters=(work.parameters, count_parameters(graph_module)),
            macs=(work.macs, count_macs(graph_module, work.tokens, UntouchedRun)),
            tokens=work.tokens,
            ratio=removal.asked.get("ratio"),
            group_ratio=removal.asked.get("group_ratio"),
            widths=widths_of(groups, keep),
            renormalised=renormalised,
            removed_blocks=blocks,
            frozen=frozen_reasons(removal.axes),
            verification_error=None if verified is None else verified.error,
            fidelity=traced.error,
            gradient_fidelity=traced.gradients,
            model_reasons=() if emitted is None or emitted.model is not None else emitted.reasons,
            notes=(*(() if notes is None else notes.lines), *unkept),
            model=work.model,
            memory=(work.memory, count_bytes(graph_module)),
            cache=work.cache,
            groups=sizes_of(groups, keep, blocks),
            scores=spreads_of(groups, keep, blocks, removal.scores),
            criterion="" if removal.scores is None else removal.scores.source,
            kept_norms=kept_in(removal.axes, keep),
            passes=(facts.get(Ran) or Ran()).passes,
        )
        facts.put(report)
        return PassResult(graph_module, False)
