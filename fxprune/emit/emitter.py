"""Emission: find a blueprint, build the slim model of the user's own class, and check it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fxprune.emit.assemble import (
    Blueprint,
    Candidate,
    EmissionTask,
    candidates_by_hand,
    candidates_for,
    divided_attributes,
    rebuild,
)
from fxprune.emit.blocks import KeptUnits, find_inputs
from fxprune.emit.choices import shared_widths_for
from fxprune.emit.epsilons import NormEpsilons, epsilon_fields
from fxprune.emit.layout import Layout, find_layout, model_rebuilder
from fxprune.emit.load import DryRuns, assign_tensors, names_on_meta, shape_errors, use_eager_experts
from fxprune.emit.patch import Resized
from fxprune.emit.snapshot import build_on_meta, shapes_of, slim_name
from fxprune.errors import VerificationError
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import within
from fxprune.modelling.overrides import OVERRIDES, Overrides
from fxprune.trace.inputs import meta_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Agrees", "Emission", "emit"]

Agrees = Callable[["PreTrainedModel"], bool]
"""Whether the outputs of an emitted model are right; a ``VerificationError`` is a no with its reason."""

Reasons = tuple[str, ...]

_MOST_REASONS = 12
"""Lines that a reader can still take in; the first are of the likeliest candidates."""


@dataclass(frozen=True)
class Emission:
    """A slim model, or why there is none.

    Args:
        model: of the dense model's class, holding the given tensors. Two attributes say how it differs:
            ``fxprune_overrides`` (an ``Overrides``: the config fields in which a block differs from ``model.config``,
            and those that the class needs at their dense values while it is built), and ``fxprune_blueprint`` (a
            ``Blueprint`` as JSON values, from which ``rebuild`` makes the same structure out of the dense config).
        reasons: block, parameter, wanted and obtained shape of what cannot be expressed; empty on success.
    """

    model: PreTrainedModel | None
    reasons: Reasons = ()


def emit(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    removed_blocks: Sequence[str] = (),
    agrees: Agrees | None = None,
    kept_units: KeptUnits | None = None,
    epsilons: NormEpsilons | None = None,
    inputs: Mapping[str, Any] | None = None,
    resized: Sequence[Resized] = (),
) -> Emission:
    """Return a model of the same class that holds the slim tensors, or the reasons why none can.

    Nothing is known of the class: config fields are moved and blocks built again on ``meta`` to see which field
    drives which axis. Where several assignments give the wanted shapes they are tried in order, those that
    leave all float attributes and everything outside the blocks alone first.

    Args:
        model: the dense model; not changed. Its storage may be on ``meta``.
        tensors: by dense name, the tensor of every parameter and buffer that remains.
        removed_blocks: module paths of the removed blocks.
        agrees: whether an emitted model computes what it should. Without it the first model that runs on
            ``meta`` is taken.
        kept_units: which units remain in the tables that the model's code makes for all units.
        inputs: of the shapes that models are run on without storage; token ids by default.
        resized: numbers that change, for attributes that are set by hand where no config field does.
    """
    removed = tuple(removed_blocks)
    layout, twin = attempt(find_layout, model), attempt(meta_twin, model)
    if isinstance(layout, Refusal):
        return Emission(None, (f"its blocks cannot be found: {layout}",))
    if isinstance(twin, Refusal):
        return Emission(None, (f"it cannot be copied: {twin}",))
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    epsilons = epsilons or NormEpsilons()
    refused = _request_errors(model, layout, tensors, removed) or epsilons.reasons[:_MOST_REASONS]
    if refused:
        return Emission(None, refused)
    rebuilder = model_rebuilder(model, layout)
    task = EmissionTask(model, layout, rebuilder, wanted, removed, kept_units or {}, epsilons, tuple(resized))
    return _Emitter(task, tensors, agrees, DryRuns(twin, inputs)).first_that_fits()


def _request_errors(
    model: PreTrainedModel, layout: Layout, tensors: Mapping[str, torch.Tensor], removed: tuple[str, ...]
) -> Reasons:
    known = layout.blocks()
    lines = [f"block {path}: not a block of this model" for path in removed if path not in known]
    if removed and layout.count_field is None:
        lines.append("blocks cannot be removed: no config field sets how many there are")
    lines += [f"{stack.path}: every block removed" for stack in layout.stacks if set(stack.paths()) <= set(removed)]
    names = {name for name in shapes_of(model) if not within(name, removed)}
    lines += [f"{name}: no tensor given for it" for name in sorted(names - tensors.keys())]
    lines += [f"{name}: the dense model has no such tensor" for name in sorted(tensors.keys() - names)]
    return tuple(lines[:_MOST_REASONS])


@dataclass(frozen=True)
class _Emitter:
    task: EmissionTask
    tensors: Mapping[str, torch.Tensor]
    agrees: Agrees | None
    runs: DryRuns

    def first_that_fits(self) -> Emission:
        """Return the first candidate that fits; those that fail on ``meta`` are tried last."""
        reasons: dict[str, None] = {}  # in order, each once
        doubtful: list[Candidate] = []
        for candidate in self.candidates():
            failure = self.failure(candidate)
            if failure is not None:
                others = divided_attributes(candidate, self.task.wanted)
                better = next((other for other in others if self.failure(other) is None), None)
                failure, candidate = (failure, candidate) if better is None else (None, better)
            if failure is not None:
                reasons.update(dict.fromkeys((*candidate.gaps, f"a candidate does not run: {failure}")))
                doubtful.append(candidate)
                continue
            made = self.make(candidate)
            if isinstance(made, transformers.PreTrainedModel):
                return Emission(made)
            reasons.update(dict.fromkeys(made))
        for candidate in doubtful if self.agrees is not None else ():
            made = self.make(candidate)
            if isinstance(made, transformers.PreTrainedModel):
                return Emission(made)
        return Emission(None, tuple(reasons)[:_MOST_REASONS] or ("the model's class cannot be built from its config",))

    def candidates(self) -> Iterator[Candidate]:
        task, tried = self.task, list[Blueprint]()
        shared_widths = shared_widths_for(task.rebuilder, task.outside())
        fields = epsilon_fields(task.model, task.layout.part, task.epsilons, task.removed)
        by_fields = chain.from_iterable(candidates_for(task, shared) for shared in shared_widths)
        for plain in chain(by_fields, candidates_by_hand(task) if task.resized else ()):
            attributes = {path: dict(own) for path, own in plain.blueprint.attributes.items()}
            for path, own in task.epsilons.attributes.items():
                attributes.setdefault(path, {}).update(own)
            blueprint = dataclasses.replace(plain.blueprint, attributes=attributes, epsilons=fields)
            for found in (*self.with_inputs(blueprint), blueprint):
                if found not in tried:
                    tried.append(found)
                    yield dataclasses.replace(plain, blueprint=found)

    def with_inputs(self, blueprint: Blueprint) -> Iterator[Blueprint]:
        """Yield the blueprint whose blocks select their rows of tables made for all units, if there are such."""
        task = self.task
        if not task.kept_units:
            return
        slim = build_on_meta(rebuild, task.model, dataclasses.replace(blueprint, removed=()), task.layout)
        if isinstance(slim, Refusal):
            return
        inputs = find_inputs(meta_twin(task.model), slim, task.layout, task.kept_units, self.runs.inputs)
        if inputs:
            yield dataclasses.replace(blueprint, inputs=inputs)

    def rename(self, name: str) -> str | None:
        return slim_name(name, self.task.removed)

    def failure(self, candidate: Candidate) -> str | None:
        """Return why a candidate does not run on ``meta``; None if it runs there, or cannot be built at all."""
        slim = build_on_meta(rebuild, self.task.model, candidate.blueprint, self.task.layout)
        if isinstance(slim, Refusal) or self.unfit(candidate, slim):
            return None
        copies = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in self.tensors.values()}
        tensors = {name: copies[id(tensor)] for name, tensor in self.tensors.items()}
        assign_tensors(slim, self.task.model, tensors, self.rename)
        return self.runs.failure_of(slim, patched=bool(candidate.blueprint.attributes))

    def unfit(self, candidate: Candidate, slim: PreTrainedModel) -> Reasons:
        loose = frozenset(new for name in candidate.loose if (new := self.rename(name)) is not None)
        errors = shape_errors(slim, self.tensors, self.rename, loose)
        there = {path for path, _ in slim.named_modules()}
        wanted = [new for path, _ in self.task.model.named_modules() if (new := self.rename(path)) is not None]
        return (*errors, *(f"{path}: the class builds no such module" for path in wanted if path not in there))

    def make(self, candidate: Candidate) -> PreTrainedModel | Reasons:
        """Return the model that a candidate gives, or the reasons why it is not the wanted one."""
        dense, blueprint = self.task.model, candidate.blueprint
        slim = build_on_meta(rebuild, dense, blueprint, self.task.layout)
        if isinstance(slim, Refusal):
            return (*candidate.gaps, f"a candidate cannot be built: {slim}")
        unfit = self.unfit(candidate, slim)
        if unfit:
            return (*candidate.gaps, *unfit)
        assign_tensors(slim, dense, self.tensors, self.rename)
        use_eager_experts(slim)
        empty = names_on_meta(slim)
        if empty and not any(tensor.is_meta for tensor in self.tensors.values()):
            return tuple(f"{name}: left without storage" for name in empty)
        if hasattr(dense, "generation_config"):
            slim.generation_config = copy.deepcopy(dense.generation_config)
        vars(slim)[OVERRIDES] = self.overrides(blueprint)
        vars(slim)["fxprune_blueprint"] = blueprint.as_dict()
        disagreement = self.disagreement(blueprint, slim)
        return slim if disagreement is None else (*candidate.gaps, disagreement)

    def disagreement(self, blueprint: Blueprint, slim: PreTrainedModel) -> str | None:
        if self.agrees is None:
            return None
        answer = attempt(self.agrees, slim, refusals=(VerificationError,))
        if isinstance(answer, Refusal):
            fails = isinstance(answer.error, VerificationError)
            return f"a candidate fails {answer.error}" if fails else f"a candidate does not run: {answer}"
        if answer:
            return None
        blocks = {path: dict(own) for path, own in list(blueprint.block_fields.items())[:2]}  # two show the pattern
        patched = f"{len(blueprint.attributes)} modules patched"
        fields = f"model fields {dict(blueprint.fields)}, block fields {blocks}, {patched}"
        return f"a candidate computes something else: {fields}"

    def overrides(self, blueprint: Blueprint) -> Overrides:
        """Return the overrides, by names of the slim model, that cannot be read off the model afterwards."""
        stacks = self.task.layout.stacks[:1]
        kept = [path for stack in stacks for path in stack.paths() if path not in blueprint.removed]
        names = {path: self.rename(path) or path for path in kept}
        fields, absent = blueprint.block_fields, blueprint.absent
        return Overrides(
            block_fields={names[path]: dict(fields[path]) for path in kept if path in fields},
            absent={names[path]: list(absent[path]) for path in kept if path in absent},
            built_with=dict(blueprint.built_with),
        )
