"""Emission: the slim model, the report, the checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxprune.checkpoint import save_pretrained
from fxprune.checkpoint.read import load_tokenizer
from fxprune.checkpoint.write import check_request
from fxprune.data.calibration import Calibration, VerificationInputs, make_inputs, token_input
from fxprune.discovery.explain import frozen_in
from fxprune.emit.emitted import Emitted, check_own_forward, emit_from_graph
from fxprune.errors import CheckpointError
from fxprune.graph.counting import Work, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import Change, Fact, Notes, Runnable, Source, facts_of
from fxprune.masking.compare import Verified
from fxprune.pipeline.arguments import argument
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Ran
from fxprune.removal.budget import CacheSize
from fxprune.removal.removal import Removed, kept_norm_modules, scaled_numbers, unkept_norm_reasons
from fxprune.report.report import Report, SamplesUsed, group_sizes, group_widths, score_spreads
from fxprune.trace.fidelity import Fidelity
from fxprune.trace.inputs import is_hugging_face


@dataclass(frozen=True, eq=False)
class EmitModelPass(Pass):
    """Builds a model of the dense class that holds the slim tensors, or reports why there can be none.

    In place, the model that the graph was traced from becomes the slim one. A module that is not a Hugging Face model
    keeps its code, which must then compute with the smaller tensors the same as the graph. The dense model is released
    afterwards.
    """

    name: ClassVar[str] = "emit-model"
    stage: ClassVar[str] = "emit"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Source, Removed, Runnable)
    wants: ClassVar[tuple[type[Fact], ...]] = (VerificationInputs,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Emitted,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Source,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        source, verified = facts[Source], facts.get(VerificationInputs)
        inputs = make_inputs(graph_module, source.example_inputs, 0) if verified is None else verified.values
        removal, emitted = facts[Removed].removal, Emitted(None, ("the model passed is not a Hugging Face model",))
        if is_hugging_face(source.model):
            emission = emit_from_graph(graph_module, source, removal, inputs)
            model = emission.model
            if model is not None and source.shares:
                source.model.__dict__.clear()  # the dense model that the caller holds becomes the slim one
                source.model.__dict__.update(model.__dict__)
                model = source.model  # type: ignore[assignment]
            emitted = Emitted(model, emission.reasons)
        elif source.shares and (removal.kept or removal.removed_blocks):
            check_own_forward(graph_module, source, inputs, scaled_numbers(removal.axes, removal.keep))
        facts.put(emitted)
        return PassResult(graph_module, False)


@dataclass(frozen=True, eq=False)
class MakeReportPass(Pass):
    """Reports sizes before and after, widths, verification and notes."""

    name: ClassVar[str] = "make-report"
    stage: ClassVar[str] = "report"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Work, Removed, Runnable)
    wants: ClassVar[tuple[type[Fact], ...]] = (Verified, Emitted, Notes, Fidelity, Ran, CacheSize, Calibration)
    gives: ClassVar[tuple[type[Fact], ...]] = (Report,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        work, removal = facts[Work], facts[Removed].removal
        verified, notes = facts.get(Verified), facts.get(Notes)
        unasked = Emitted(None, ("the recipe has no emit-model, the pass that builds the slim model",))
        emitted = facts.get(Emitted) or unasked
        traced, cache = facts.get(Fidelity) or Fidelity(None), facts.get(CacheSize)
        calibration, reads_tokens = facts.get(Calibration), token_input(graph_module) is not None
        generates = emitted.model is None or emitted.model.can_generate()
        groups, keep, blocks = removal.groups, removal.keep, removal.removed_blocks
        widths, sizes = group_widths(groups, keep), group_sizes(groups, keep, blocks)
        renormalised = {one.name: one.renormalised for one in groups if one.renormalised and one.name in widths}
        lines = [*(() if notes is None else notes.lines)]
        lines += unkept_norm_reasons(removal.axes, dict.fromkeys(itertools.chain(*renormalised.values())))
        if work.outside:
            share = work.outside / (work.outside + work.parameters)
            what = f"{work.outside:,} parameters of the model ({share:.1%}) are not read on the example inputs"
            lines.append(f"{what}: they stay, and count neither in the ratio nor in the sizes here")
        report = Report(
            parameters=(work.parameters, count_parameters(graph_module)),
            macs=(work.macs, count_macs(graph_module, work.tokens)),
            tokens=work.tokens if reads_tokens else 0,
            ratio=removal.asked.get("ratio"),
            group_ratio=removal.asked.get("group_ratio"),
            reached=removal.reached,
            widths=widths,
            renormalised=renormalised,
            removed_blocks=blocks,
            frozen={axis: str(freeze) for axis, freeze in frozen_in(removal.axes).items()},
            verification_error=None if verified is None else verified.error,
            fidelity=traced.error,
            gradient_fidelity=traced.gradients,
            model_reasons=() if emitted.model is not None else emitted.reasons,
            notes=tuple(lines),
            model=work.model,
            memory=(work.memory, count_bytes(graph_module)),
            cache=None if cache is None or not reads_tokens or not generates else (cache.dense, cache.slim),
            groups=sizes,
            scores=score_spreads(groups, sizes, keep, removal.scores),
            criterion="" if removal.scores is None else removal.scores.source,
            kept_norms=kept_norm_modules(removal.axes, keep),
            passes=(facts.get(Ran) or Ran()).passes,
            calibration=None if calibration is None else SamplesUsed.of(calibration),
        )
        facts.put(report)
        return PassResult(graph_module, False)


@dataclass(frozen=True, eq=False)
class SaveCheckpointPass(Pass):
    """Writes the slim Hugging Face model with its plan and report to a folder; see :func:`fxprune.save_pretrained`."""

    name: ClassVar[str] = "save-checkpoint"
    stage: ClassVar[str] = "save"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Emitted, Removed, Report)

    folder: str = argument("", "The folder to write.")
    tokenizer: Any = argument(None, "A tokenizer to save with the model, or the folder of one.")
    max_shard_size: int | str = argument("5GB", "The largest file of weights, in bytes or as text.")

    def check_arguments(self) -> None:
        tokenizer = None if isinstance(self.tokenizer, str) else self.tokenizer
        check_request(self.folder or "slim", tokenizer, self.max_shard_size)
        if not self.folder:
            raise CheckpointError("no folder", where=f"pass {self.name}", remedy="Write save-checkpoint{folder=slim}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        named = isinstance(self.tokenizer, str)
        tokenizer = load_tokenizer(self.tokenizer) if named else self.tokenizer
        save_pretrained(
            facts[Emitted].require_model(),
            self.folder,
            tokenizer,
            plan=facts[Removed].removal.plan,
            report=facts[Report],
            max_shard_size=self.max_shard_size,
        )
        return PassResult(graph_module, False)
