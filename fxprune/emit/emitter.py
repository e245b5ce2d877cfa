"""A slim model of the user's own class is built, and judged by what it holds and computes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fxprune.emit.assemble import Bench, Candidate, candidates_for
from fxprune.emit.fields import part_of
from fxprune.emit.frame import frames_for
from fxprune.emit.layout import Layout, survey
from fxprune.emit.load import assign, left_on_meta, misfits, run_on_meta, standins, suit_experts
from fxprune.emit.recipe import Recipe, new_names, rebuild
from fxprune.emit.sites import model_site
from fxprune.emit.snapshot import shapes_of
from fxprune.emit.tables import Numbered, find_inputs
from fxprune.trace.capture import meta_twin

__all__ = ["Agrees", "Emission", "emit"]

Agrees = Callable[[PreTrainedModel], bool]
_MOST_REASONS = 12


@dataclass(frozen=True)
class Emission:
    """A slim model, or why there is none.

    Attributes:
        model: Of the dense model's class, holding the given tensors. Four attributes say how it differs:
            `fxprune_layer_fields` (by new layer index, the config fields in which a layer differs from
            `model.config`), `fxprune_built_with` (config fields that its class wants at their dense values while it
            is built), `fxprune_recipe` (a `Recipe` as JSON values, from which `rebuild` makes the same
            structure out of the dense config) and the config itself.
        reasons: Layer, parameter, wanted and obtained shape of what has no expression; empty on success.
    """

    model: PreTrainedModel | None
    reasons: tuple[str, ...] = ()


def emit(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    removed_layers: Sequence[str] = (),
    agrees: Agrees | None = None,
    numbered: Numbered | None = None,
) -> Emission:
    """A model of the same class holds the slim tensors, or the reasons why none can are returned.

    Nothing is known of the class: config fields are moved and blocks rebuilt on `meta` to see which field
    drives which axis. Where several assignments give the wanted shapes they are tried in order, those that
    leave all float attributes and everything outside the blocks alone first.

    Args:
        model: The dense model; not changed. Its storage may be on `meta`.
        tensors: By dense name, the tensor of every parameter and buffer that remains.
        removed_layers: Module paths of whole blocks that are gone.
        agrees: Whether an emitted model computes what it should. Without it the first model that runs on
            `meta` is taken.
        numbered: Which units remain of those that the model's code knows by number: by module path of a block
            (empty for all blocks), by number of units before.
    """
    try:
        return _emit(model, tensors, tuple(removed_layers), agrees, numbered or {})
    except Exception as error:
        return Emission(None, (f"emission stopped: {type(error).__name__}: {error}",))


def _emit(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    removed: tuple[str, ...],
    agrees: Agrees | None,
    numbered: Numbered,
) -> Emission:
    layout = survey(model)
    refused = _refusals(model, layout, tensors, removed)
    if refused:
        return Emission(None, refused)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    bench = Bench(model, layout, model_site(model, layout), wanted, removed, numbered)
    runs = run_on_meta(_without_storage(model)) is None
    reasons: dict[str, None] = {}
    doubtful: list[Candidate] = []
    for candidate in _candidates(bench):
        failure = _failure(bench, candidate, tensors) if runs else None
        if failure is not None:
            reasons.update(dict.fromkeys((*candidate.gaps, f"a candidate does not run: {failure}")))
            doubtful.append(candidate)
            continue
        slim, why = _attempt(bench, candidate, tensors, agrees)
        if slim is not None:
            return Emission(slim)
        reasons.update(dict.fromkeys(why))
    for candidate in doubtful if agrees is not None else ():
        slim, _ = _attempt(bench, candidate, tensors, agrees)
        if slim is not None:
            return Emission(slim)
    if not reasons:
        reasons["the model's class cannot be rebuilt from its config"] = None
    return Emission(None, tuple(reasons)[:_MOST_REASONS])


def _without_storage(model: PreTrainedModel) -> PreTrainedModel:
    twin = meta_twin(model)
    assert isinstance(twin, PreTrainedModel)
    return twin


def _refusals(
    model: PreTrainedModel, layout: Layout, tensors: Mapping[str, torch.Tensor], removed: tuple[str, ...]
) -> tuple[str, ...]:
    known = layout.blocks()
    lines = [f"layer {path}: not a block of this model" for path in removed if path not in known]
    if removed and layout.count_field is None:
        lines.append("layers cannot be removed: no config field sets the number of blocks")
    for stack in layout.stacks:
        if set(stack.paths()) <= set(removed):
            lines.append(f"{stack.path}: every block removed")
    gone = tuple(f"{path}." for path in removed)
    names = {name for name in shapes_of(model) if not (gone and name.startswith(gone))}
    lines += [f"{name}: no tensor given for it" for name in sorted(names - tensors.keys())]
    lines += [f"{name}: the dense model has no such tensor" for name in sorted(tensors.keys() - names)]
    return tuple(lines[:_MOST_REASONS])


def _candidates(bench: Bench) -> Iterator[Candidate]:
    tried: list[Recipe] = []
    for frame in frames_for(bench.site, bench.outside()):
        for plain in candidates_for(bench, frame):
            for candidate in (*_selecting(bench, plain), plain):
                if candidate.recipe not in tried:
                    tried.append(candidate.recipe)
                    yield candidate


def _selecting(bench: Bench, candidate: Candidate) -> Iterator[Candidate]:
    """The candidate whose blocks take their rows of a table that the model makes for all units, if there is one."""
    if not bench.numbered:
        return
    recipe = dataclasses.replace(candidate.recipe, removed=())
    try:
        slim = rebuild(bench.model, recipe, bench.layout)
    except Exception:
        return
    inputs = find_inputs(_without_storage(bench.model), slim, bench.layout, bench.numbered)
    if inputs:
        yield dataclasses.replace(candidate, recipe=dataclasses.replace(candidate.recipe, inputs=inputs))


def _failure(bench: Bench, candidate: Candidate, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What stops a candidate on `meta`; None where it runs there, or cannot be built at all."""
    rename = new_names(candidate.recipe, bench.layout)
    try:
        slim = rebuild(bench.model, candidate.recipe, bench.layout)
        assign(slim, bench.model, standins(tensors), rename)
    except Exception:
        return None
    return run_on_meta(slim)


def _attempt(
    bench: Bench, candidate: Candidate, tensors: Mapping[str, torch.Tensor], agrees: Agrees | None
) -> tuple[PreTrainedModel | None, tuple[str, ...]]:
    rename = new_names(candidate.recipe, bench.layout)
    try:
        slim = rebuild(bench.model, candidate.recipe, bench.layout)
    except Exception as error:
        return None, (*candidate.gaps, f"a candidate cannot be built: {type(error).__name__}: {error}")
    loose = frozenset(new for name in candidate.loose if (new := rename(name)) is not None)
    unfit = misfits(slim, tensors, rename, loose)
    if unfit:
        return None, (*candidate.gaps, *unfit)
    assign(slim, bench.model, tensors, rename)
    suit_experts(slim)
    empty = left_on_meta(slim)
    if empty and not any(tensor.is_meta for tensor in tensors.values()):
        return None, tuple(f"{name}: left without storage" for name in empty)
    return _checked(bench, candidate, slim, agrees)


def _checked(
    bench: Bench, candidate: Candidate, slim: PreTrainedModel, agrees: Agrees | None
) -> tuple[PreTrainedModel | None, tuple[str, ...]]:
    if hasattr(bench.model, "generation_config"):
        slim.generation_config = copy.deepcopy(bench.model.generation_config)
    vars(slim)["fxprune_layer_fields"] = _layer_fields(bench, candidate.recipe)
    dense = vars(part_of(bench.model.config, bench.layout.part))
    vars(slim)["fxprune_built_with"] = {name: dense[name] for name in candidate.recipe.noted if name in dense}
    vars(slim)["fxprune_recipe"] = candidate.recipe.as_dict()
    if agrees is None:
        return slim, ()
    try:
        if agrees(slim):
            return slim, ()
    except Exception as error:
        return None, (*candidate.gaps, f"a candidate does not run: {type(error).__name__}: {error}")
    return None, (*candidate.gaps, f"a candidate computes something else: {_told(candidate.recipe)}")


def _told(recipe: Recipe) -> str:
    layers = {path: dict(fields) for path, fields in list(recipe.layer_fields.items())[:2]}
    return f"model fields {dict(recipe.fields)}, layer fields {layers}, {len(recipe.attributes)} modules patched"


def _layer_fields(bench: Bench, recipe: Recipe) -> dict[int, dict[str, int]]:
    """By new layer index, the fields in which a layer's config differs from the model's."""
    dense = vars(part_of(bench.model.config, bench.layout.part))
    whole = {**dense, **recipe.fields}
    kept = [path for path in bench.layout.stacks[0].paths() if path not in recipe.removed]
    found: dict[int, dict[str, int]] = {}
    for position, path in enumerate(kept):
        if path not in recipe.layer_fields:
            continue
        own = {**{name: dense[name] for name in recipe.fields if name in dense}, **recipe.layer_fields[path]}
        changed = {name: value for name, value in own.items() if whole.get(name) != value}
        if changed:
            found[position] = changed
    return found
