"""Emission: a slim model of the user's own class, built, and judged by what it holds and computes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import PreTrainedModel

from fxprune.emit.assemble import Candidate, candidates_for, mended
from fxprune.emit.blocks import Numbered, find_inputs
from fxprune.emit.choices import shared_widths_for
from fxprune.emit.epsilons import Places, driving_fields
from fxprune.emit.layout import Layout, model_rebuilder, survey
from fxprune.emit.load import DryRuns, Rename, assign, left_on_meta, misfits, missing_modules, standins, suit_experts
from fxprune.emit.recipe import Blueprint, EmissionTask, rebuild
from fxprune.emit.snapshot import build_on_meta, shapes_of, slim_name
from fxprune.errors import VerificationError
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import within
from fxprune.modelling.overrides import OVERRIDES, Overrides
from fxprune.trace.inputs import meta_twin

__all__ = ["Agrees", "Emission", "emit"]

Agrees = Callable[[PreTrainedModel], bool]
"""Whether an emitted model computes what it should; a ``VerificationError`` stands for a no with its reason."""

Reasons = tuple[str, ...]
Tensors = Mapping[str, torch.Tensor]

_MOST_REASONS = 12
"""Lines that a reader can still take in; the first are of the likeliest candidates."""


@dataclass(frozen=True)
class Emission:
    """A slim model, or why there is none.

    Args:
        model: of the dense model's class, holding the given tensors. Two attributes say how it differs:
            ``fxprune_overrides`` (an ``Overrides``: the config fields in which a block differs from ``model.config``,
            and those that the class wants at their dense values while it is built), and ``fxprune_recipe`` (a
            ``Blueprint`` as JSON values, from which ``rebuild`` makes the same structure out of the dense config).
        reasons: block, parameter, wanted and obtained shape of what has no expression; empty on success.
    """

    model: PreTrainedModel | None
    reasons: Reasons = ()


def emit(
    model: PreTrainedModel,
    tensors: Tensors,
    removed_blocks: Sequence[str] = (),
    agrees: Agrees | None = None,
    numbered: Numbered | None = None,
    epsilons: Places | None = None,
) -> Emission:
    """Return a model of the same class that holds the slim tensors, or the reasons why none can.

    Nothing is known of the class: config fields are moved and blocks built again on ``meta`` to see which field
    drives which axis. Where several assignments give the wanted shapes they are tried in order, those that
    leave all float attributes and everything outside the blocks alone first.

    Args:
        model: the dense model; not changed. Its storage may be on ``meta``.
        tensors: by dense name, the tensor of every parameter and buffer that remains.
        removed_blocks: module paths of whole blocks that are gone.
        agrees: whether an emitted model computes what it should. Without it the first model that runs on
            ``meta`` is taken.
        numbered: which units remain of those that the model's code knows by number: by module path of a block
            (empty for all blocks), by number of units before.
        epsilons: where the model holds the numbers that norms add, of those that change.
    """
    removed = tuple(removed_blocks)
    layout, twin = attempt(survey, model), attempt(meta_twin, model)
    if isinstance(layout, Refusal):
        return Emission(None, (f"its blocks cannot be looked for: {layout}",))
    if isinstance(twin, Refusal):
        return Emission(None, (f"it cannot be copied: {twin}",))
    refused = _refusals(model, layout, tensors, removed)
    if refused:
        return Emission(None, refused)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    places = epsilons or Places()
    if places.reasons:
        return Emission(None, places.reasons[:_MOST_REASONS])
    task = EmissionTask(model, layout, model_rebuilder(model, layout), wanted, removed, numbered or {}, places)
    return _first_that_fits(task, tensors, agrees, DryRuns(_same_class(twin)))


def _same_class(twin: torch.nn.Module) -> PreTrainedModel:
    assert isinstance(twin, PreTrainedModel)  # a copy is of the class of its original
    return twin


def _refusals(model: PreTrainedModel, layout: Layout, tensors: Tensors, removed: tuple[str, ...]) -> Reasons:
    """Return what makes no sense of what is asked, in words."""
    known = layout.blocks()
    lines = [f"block {path}: not a block of this model" for path in removed if path not in known]
    if removed and layout.count_field is None:
        lines.append("blocks cannot be removed: no config field sets how many there are")
    lines += [f"{stack.path}: every block removed" for stack in layout.stacks if set(stack.paths()) <= set(removed)]
    names = {name for name in shapes_of(model) if not within(name, removed)}
    lines += [f"{name}: no tensor given for it" for name in sorted(names - tensors.keys())]
    lines += [f"{name}: the dense model has no such tensor" for name in sorted(tensors.keys() - names)]
    return tuple(lines[:_MOST_REASONS])


def _first_that_fits(task: EmissionTask, tensors: Tensors, agrees: Agrees | None, runs: DryRuns) -> Emission:
    """Return the first candidate that holds the tensors and agrees; those that fail on ``meta`` are tried last.

    Args:
        task: what is emitted.
        tensors: by dense name.
        agrees: the caller's judgement.
        runs: says how candidates run on ``meta``.
    """
    reasons: dict[str, None] = {}
    doubtful: list[Candidate] = []
    for candidate in _candidates(task):
        failure = _failure(task, candidate, tensors, runs)
        if failure is not None:
            others = mended(candidate, task.wanted)
            better = next((other for other in others if _failure(task, other, tensors, runs) is None), None)
            failure, candidate = (failure, candidate) if better is None else (None, better)
        if failure is not None:
            reasons.update(dict.fromkeys((*candidate.gaps, f"a candidate does not run: {failure}")))
            doubtful.append(candidate)
            continue
        made = _make(task, candidate, tensors, agrees)
        if isinstance(made, PreTrainedModel):
            return Emission(made)
        reasons.update(dict.fromkeys(made))
    for candidate in doubtful if agrees is not None else ():
        made = _make(task, candidate, tensors, agrees)
        if isinstance(made, PreTrainedModel):
            return Emission(made)
    return Emission(None, tuple(reasons)[:_MOST_REASONS] or ("the model's class cannot be built from its config",))


def _candidates(task: EmissionTask) -> Iterator[Candidate]:
    """Yield different candidates, the likeliest first; they are made as they are asked for."""
    tried: list[Blueprint] = []
    shared_widths = shared_widths_for(task.rebuilder, task.outside())
    fields = driving_fields(task.model, task.layout.part, task.epsilons, task.removed)
    made = chain.from_iterable(candidates_for(task, shared) for shared in shared_widths)
    plain = (_adding(candidate, task.epsilons, fields) for candidate in made)
    for candidate in chain.from_iterable((*_selecting(task, one), one) for one in plain):
        if candidate.recipe not in tried:
            tried.append(candidate.recipe)
            yield candidate


def _adding(candidate: Candidate, epsilons: Places, fields: Mapping[str, float]) -> Candidate:
    """Return a candidate whose norms add the numbers that they are to."""
    recipe = candidate.recipe
    attributes = {path: dict(own) for path, own in recipe.attributes.items()}
    for path, own in epsilons.attributes.items():
        attributes.setdefault(path, {}).update(own)
    changed = dataclasses.replace(recipe, attributes=attributes, epsilons=fields)
    return dataclasses.replace(candidate, recipe=changed)


def _selecting(task: EmissionTask, candidate: Candidate) -> Iterator[Candidate]:
    """Yield the candidate whose blocks take their rows of tables made for all units, if there are such."""
    if not task.numbered:
        return
    recipe = dataclasses.replace(candidate.recipe, removed=())
    slim = build_on_meta(rebuild, task.model, recipe, task.layout)
    if isinstance(slim, Refusal):
        return
    inputs = find_inputs(_same_class(meta_twin(task.model)), slim, task.layout, task.numbered)
    if inputs:
        yield dataclasses.replace(candidate, recipe=dataclasses.replace(candidate.recipe, inputs=inputs))


def _renaming(task: EmissionTask) -> Rename:
    return lambda name: slim_name(name, task.removed)


def _failure(task: EmissionTask, candidate: Candidate, tensors: Tensors, runs: DryRuns) -> str | None:
    """Return what stops a candidate on ``meta``; None where it runs there, or cannot be built at all."""
    rename = _renaming(task)
    slim = build_on_meta(rebuild, task.model, candidate.recipe, task.layout)
    if isinstance(slim, Refusal) or _unfit(task, candidate, slim, tensors):
        return None
    assign(slim, task.model, standins(tensors), rename)
    return runs.failure_of(slim, patched=bool(candidate.recipe.attributes))


def _unfit(task: EmissionTask, candidate: Candidate, slim: PreTrainedModel, tensors: Tensors) -> Reasons:
    """Return why a candidate cannot hold the tensors, in words; empty where it can."""
    rename = _renaming(task)
    loose = frozenset(new for name in candidate.loose if (new := rename(name)) is not None)
    return (*misfits(slim, tensors, rename, loose), *missing_modules(slim, task.model, rename))


def _make(
    task: EmissionTask, candidate: Candidate, tensors: Tensors, agrees: Agrees | None
) -> PreTrainedModel | Reasons:
    """Return the model that a candidate gives, or why it is not the one that is wanted."""
    slim = build_on_meta(rebuild, task.model, candidate.recipe, task.layout)
    if isinstance(slim, Refusal):
        return (*candidate.gaps, f"a candidate cannot be built: {slim}")
    unfit = _unfit(task, candidate, slim, tensors)
    if unfit:
        return (*candidate.gaps, *unfit)
    assign(slim, task.model, tensors, _renaming(task))
    suit_experts(slim)
    empty = left_on_meta(slim)
    if empty and not any(tensor.is_meta for tensor in tensors.values()):
        return tuple(f"{name}: left without storage" for name in empty)
    if hasattr(task.model, "generation_config"):
        slim.generation_config = copy.deepcopy(task.model.generation_config)
    vars(slim)[OVERRIDES] = _overrides(task, candidate.recipe)
    vars(slim)["fxprune_recipe"] = candidate.recipe.as_dict()
    disagreement = None if agrees is None else _disagreement(candidate.recipe, slim, agrees)
    return slim if disagreement is None else (*candidate.gaps, disagreement)


def _disagreement(recipe: Blueprint, slim: PreTrainedModel, agrees: Agrees) -> str | None:
    """Return in words what the caller has against a model, if anything."""
    answer = attempt(agrees, slim, refusals=(VerificationError,))
    if isinstance(answer, Refusal):
        fails = isinstance(answer.error, VerificationError)
        return f"a candidate fails {answer.error}" if fails else f"a candidate does not run: {answer}"
    if answer:
        return None
    blocks = {path: dict(fields) for path, fields in list(recipe.block_fields.items())[:2]}  # two show the pattern
    told = f"model fields {dict(recipe.fields)}, block fields {blocks}, {len(recipe.attributes)} modules patched"
    return f"a candidate computes something else: {told}"


def _overrides(task: EmissionTask, recipe: Blueprint) -> Overrides:
    """Return the overrides of a slim model, by its own names, that cannot be read off it afterwards."""
    kept = [path for stack in task.layout.stacks[:1] for path in stack.paths() if path not in recipe.removed]
    names = {path: slim_name(path, recipe.removed) or path for path in kept}
    return Overrides(
        block_fields={names[path]: dict(recipe.block_fields[path]) for path in kept if path in recipe.block_fields},
        absent={names[path]: list(recipe.absent[path]) for path in kept if path in recipe.absent},
        built_with=dict(recipe.built_with),
    )
