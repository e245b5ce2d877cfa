"""Emission: the slim model, the report, the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import fx, nn
from transformers import AutoTokenizer

from fxprune.checkpoint import save_pretrained
from fxprune.checkpoint.write import check_request
from fxprune.data.verification import VerificationInputs
from fxprune.draw.write import layer_svg
from fxprune.emit.emitted import Emitted, check_own_forward, emit_from_graph
from fxprune.errors import CheckpointError, PassError
from fxprune.graph.counting import TOKENS, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import Change, Fact, Notes, Runnable, Source, facts_of
from fxprune.masking.compare import Verified
from fxprune.masking.masked_run import UntouchedRun
from fxprune.pipeline.arguments import whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Ran
from fxprune.removal.budget import make_budget
from fxprune.removal.removal import Removal, Removed, kept_in, scaled_numbers, unkept_in
from fxprune.report.report import Report, Work, frozen_reasons, renormalised_in, sizes_of, spreads_of, widths_of
from fxprune.trace.fidelity import Fidelity
from fxprune.trace.inputs import is_hugging_face

__all__ = ["CountWorkPass", "EmitModelPass", "MakeReportPass", "SaveCheckpointPass", "Saved"]


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


@dataclass(frozen=True, eq=False)
class EmitModelPass(Pass):
    """Builds a model of the dense one's class that holds the slim tensors, or says why there can be none.

    In place on a graph that shares its tensors with the model it was traced from, that model becomes the slim one. One
    that is no Hugging Face model keeps its code, which has to compute with what is left what the graph does.
    The dense model is let go of afterwards: whoever needs it traces it again.
    """

    name: ClassVar[str] = "emit-model"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Source, Removed, VerificationInputs, Runnable)
    gives: ClassVar[tuple[type[Fact], ...]] = (Emitted,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Source,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the model.

        Raises:
            PlanError: the tensors of a module that is no Hugging Face model were cut, and its code cannot do with the
                rest.
        """
        facts = facts_of(graph_module)
        source = facts[Source]
        if not is_hugging_face(source.model):
            removal = facts[Removed].removal
            if source.shares and (removal.kept or removal.removed_blocks):
                numbers = scaled_numbers(removal.axes, removal.keep)
                check_own_forward(graph_module, source, facts[VerificationInputs].values, numbers)
            facts.put(Emitted(None, ("the model passed is not a Hugging Face model",)))
            return PassResult(graph_module, False)
        emission = emit_from_graph(graph_module, source, facts[Removed].removal, facts[VerificationInputs].values)
        model = emission.model
        if model is not None and source.shares:
            _become(source.model, model)
            model = source.model  # type: ignore[assignment]
        facts.put(Emitted(model, emission.reasons))
        return PassResult(graph_module, False)


def _become(model: nn.Module, slim: nn.Module) -> None:
    """Turn the dense model the caller holds into the slim one."""
    model.__dict__.clear()
    model.__dict__.update(slim.__dict__)


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


@dataclass(frozen=True)
class Saved(Fact):
    """The slim model is on disk.

    Args:
        folder: where.
        is_stock: whether stock transformers loads it by its config alone.
    """

    folder: Path
    is_stock: bool


@dataclass(frozen=True, eq=False)
class SaveCheckpointPass(Pass):
    """Writes the slim Hugging Face model with its plan and report to a folder; see :func:`fxprune.save_pretrained`.

    Args:
        folder: where to.
        tokenizer: saved with it; a tokenizer, or the folder of one.
        max_shard_size: the largest file of weights, in bytes or as text such as ``"5GB"``.
    """

    name: ClassVar[str] = "save-checkpoint"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Emitted, Removed, Report)
    gives: ClassVar[tuple[type[Fact], ...]] = (Saved,)

    folder: str = ""
    tokenizer: Any = None
    max_shard_size: int | str = "5GB"

    def check_arguments(self) -> None:
        """Raise where it is not said where to, or nothing could be written there.

        Raises:
            CheckpointError: there is no folder, or an argument is of the wrong type.
        """
        tokenizer = None if isinstance(self.tokenizer, str) else self.tokenizer
        check_request(self.folder or "slim", tokenizer, self.max_shard_size)
        if not self.folder:
            raise CheckpointError("no folder", where=f"pass {self.name}", remedy="Write save-checkpoint{folder=slim}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Write all of it, or nothing.

        Raises:
            CheckpointError: there is no slim Hugging Face model, or the folder holds something else.
        """
        facts = facts_of(graph_module)
        plan = facts[Removed].removal.plan
        structure = save_pretrained(
            facts[Emitted].require_model(),
            self.folder,
            self._tokenizer(),
            plan=plan,
            report=replace(facts[Report], picture=layer_svg(graph_module, plan.norm)),
            max_shard_size=self.max_shard_size,
        )
        facts.put(Saved(Path(self.folder), structure.is_stock))
        return PassResult(graph_module, False)

    def _tokenizer(self) -> Any:
        return self.tokenizer if not isinstance(self.tokenizer, str) else AutoTokenizer.from_pretrained(self.tokenizer)
