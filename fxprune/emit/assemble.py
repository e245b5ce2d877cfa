"""Choices for all blocks put together, one candidate model at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.choices import Choice, SharedWidths, choices_for
from fxprune.emit.layout import Rebuilder, block_rebuilder
from fxprune.emit.patch import Patches, merged, numbers_of
from fxprune.emit.recipe import Blueprint, EmissionTask
from fxprune.emit.snapshot import Axis, Shape, mismatches, names_in, part_of, shapes_of
from fxprune.modelling.blocks import BUILT_AT

__all__ = ["Candidate", "candidates_for", "mended"]

_LARGEST = 16
"""Attributes that are quotients of numbers of heads are small; what is larger is a width."""


def mended(candidate: Candidate, tensors: Collection[str]) -> Iterator[Candidate]:
    """Yield a candidate with one small integer attribute divided, in all modules where it is the same number.

    Where widths were set by hand, an attribute of the module around them, such as how many queries share a key, may be
    the one of more heads: one kernel works it out from shapes, another reads it.

    Args:
        candidate: what fails.
        tensors: names of tensors; modules that own one have widths for attributes, which are right already.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    attributes = candidate.recipe.attributes
    found = {
        (value, name)
        for path, here in attributes.items()
        for name, value in here.items()
        if path not in owners and isinstance(value, int) and 1 < value <= _LARGEST
    }
    for value, name in sorted(found):
        for smaller in (n for n in range(1, value) if value % n == 0):
            changed = {
                path: {**here, name: smaller} if path not in owners and here.get(name) == value else here
                for path, here in attributes.items()
            }
            yield dataclasses.replace(candidate, recipe=dataclasses.replace(candidate.recipe, attributes=changed))


_MOST_CANDIDATES = 24
"""Bounds the time for one choice of shared widths: each is built and run. The likeliest come first."""


@dataclass(frozen=True)
class Candidate:
    """A recipe, and what is known about it before it is tried.

    Args:
        recipe: how to build the model.
        loose: dense names whose shapes the class does not give: attributes were set to fit.
        gaps: what config fields alone do not reach, in words.
    """

    recipe: Blueprint
    loose: frozenset[str]
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """A block that stays, with the ways to build it.

    Args:
        own: fields in which the dense block already differs from the model's config.
        kind: the class and the axes that change; blocks of one kind are built the same way.
        rebuilder: builds it again; None where its class cannot be called.
        pending: the ways to build it that were not asked for yet; their fields come on top of ``own``.
    """

    own: Mapping[str, int]
    kind: tuple[type, frozenset[Axis]]
    rebuilder: Rebuilder | None
    pending: Iterator[Choice]
    _found: list[Choice] = field(default_factory=list)

    def likeliest(self) -> Choice:
        """Return the first way to build it, of which there is always one."""
        if not self._found:
            self._found.append(next(self.pending))
        return self._found[0]

    def choices(self) -> list[Choice]:
        """Return all ways to build it: looking for them takes its time."""
        self._found.extend(self.pending)
        return self._found


def candidates_for(task: EmissionTask, shared: SharedWidths) -> Iterator[Candidate]:
    """Yield candidate models for one choice of shared widths, the likeliest first; at most a few dozen."""
    blocks = _blocks(task, shared)
    yield _candidate(task, shared, blocks, {path: block.likeliest() for path, block in blocks.items()})
    kinds = {block.kind: 0 for block in blocks.values()}
    for block in blocks.values():
        kinds[block.kind] = max(kinds[block.kind], len(block.choices()))
    picks = sorted(product(*(range(count) for count in kinds.values())), key=sum)
    for pick in picks[1:_MOST_CANDIDATES]:
        rank = dict(zip(kinds, pick, strict=True))
        ways = {path: block.choices() for path, block in blocks.items()}
        chosen = {path: found[min(rank[blocks[path].kind], len(found) - 1)] for path, found in ways.items()}
        yield _candidate(task, shared, blocks, chosen)


def _blocks(task: EmissionTask, shared: SharedWidths) -> dict[str, _Block]:
    made: dict[object, _Block] = {}
    found: dict[str, _Block] = {}
    whole = part_of(task.model.config, task.layout.part)
    for path, (index, module) in task.layout.blocks().items():
        if path in task.removed:
            continue
        own = _own_fields(module, whole)
        wanted, have = names_in(task.wanted, path), shapes_of(module)
        key = (type(module), *(tuple(sorted(part.items())) for part in (own, wanted, have)))
        if key not in made:
            made[key] = _block(task, shared, (index, module), own, wanted)
        found[path] = made[key]
    return found


def _own_fields(block: nn.Module, whole: PreTrainedConfig) -> dict[str, int]:
    """Return the integer fields in which the config that a block holds differs from the model's."""
    config = next((vars(module)["config"] for module in block.modules() if "config" in vars(module)), whole)
    if config is whole or not isinstance(config, PreTrainedConfig):
        return {}
    return {k: v for k, v in vars(config).items() if type(v) is int and vars(whole).get(k) != v}


def _block(
    task: EmissionTask,
    shared: SharedWidths,
    at: tuple[int, nn.Module],
    own: Mapping[str, int],
    wanted: Mapping[str, Shape],
) -> _Block:
    index, module = at
    rebuilder = block_rebuilder(task.model, task.layout, index, module, own)
    outside = task.outside()

    def harm(fields: Mapping[str, int]) -> int:
        seen = task.rebuilder.observe({**shared.fields, **fields})
        return len(outside) if seen is None else len(mismatches(seen.shapes, outside))

    wanted = _built_by(module, rebuilder, wanted)
    bases = [shared.fields, {}] if shared.fields else [{}]
    choices = choices_for(module, rebuilder, bases, wanted, harm)
    return _Block(own, (type(module), mismatches(shapes_of(module), wanted)), rebuilder, choices)


def _built_by(module: nn.Module, rebuilder: Rebuilder | None, wanted: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Return the wanted shapes less those of buffers that the model, not the block's class, adds to a block."""
    seen = rebuilder.observe({}) if rebuilder is not None else None
    if seen is None:
        return wanted
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: shape for name, shape in wanted.items() if name in seen.shapes or name not in buffers}


def _candidate(
    task: EmissionTask, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]
) -> Candidate:
    fields, full = _with_adopted(task, shared, blocks, chosen)
    extra = {name: value for name, value in fields.items() if name not in shared.fields}
    around = shared.patches(task.rebuilder, task.outside(), extra)
    dense = vars(part_of(task.model.config, task.layout.part))
    differing = {path: _differing(dense, fields, own) for path, own in full.items()}
    lacking = {path: sorted(fields.keys() - dense.keys() - own.keys()) for path, own in full.items()}
    blocks_built_at = {p: vars(b)[BUILT_AT] for p, (_, b) in task.layout.blocks().items() if BUILT_AT in vars(b)}
    recipe = Blueprint(
        fields=fields,
        block_fields={path: own for path, own in differing.items() if own},
        absent={path: names for path, names in lacking.items() if names},
        built_at=blocks_built_at,
        attributes={**_block_attributes(task, chosen), **around},
        removed=task.removed,
        built_with={name: dense[name] for name in shared.written_afterwards if name in dense},
        written_afterwards=shared.written_afterwards,
    )
    return _judged(task, recipe, chosen)


def _with_adopted(
    task: EmissionTask, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the fields of the whole model and of each block, with those that all blocks share moved to the model."""
    full = {path: {**block.own, **chosen[path].fields} for path, block in blocks.items()}
    fields = dict(shared.fields)
    for name in sorted({name for own in full.values() for name in own} - fields.keys()):
        adopted = _adopted(name, blocks, full)
        if adopted is not None and _harmless(task, fields, {name: adopted}):
            fields[name] = adopted
            full = {path: {**own, name: adopted} for path, own in full.items()}
    return fields, full


def _adopted(name: str, blocks: Mapping[str, _Block], full: Mapping[str, Mapping[str, int]]) -> int | None:
    """Return the value that all blocks have for a field, or do not care about."""
    values = {fields[name] for fields in full.values() if name in fields}
    if len(values) != 1:
        return None
    value = values.pop()
    for path, fields in full.items():
        rebuilder = blocks[path].rebuilder
        if name in fields:
            continue
        if rebuilder is None or rebuilder.observe({**fields, name: value}) != rebuilder.observe(fields):
            return None
    return value


def _harmless(task: EmissionTask, fields: Mapping[str, int], more: Mapping[str, int]) -> bool:
    """Whether further fields leave everything around the blocks as it is."""
    before, after = task.rebuilder.observe(fields), task.rebuilder.observe({**fields, **more})
    if before is None or after is None:
        return before is after
    return before.shapes == after.shapes


def _differing(dense: Mapping[str, Any], shared: Mapping[str, int], own: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields in which a block's config differs from that of the whole slim model.

    Args:
        dense: fields of the dense model's config.
        shared: fields that the whole model changes.
        own: fields of the block that differ from the dense model's config.
    """
    whole = {**dense, **shared}
    full = {**{name: dense[name] for name in shared if name in dense}, **own}
    return {name: value for name, value in full.items() if whole.get(name) != value}


def _block_attributes(task: EmissionTask, chosen: Mapping[str, Choice]) -> Patches:
    found: Patches = {}
    for path, choice in chosen.items():
        start = numbers_of(task.model.get_submodule(path)) if choice.as_dense else {}
        for inner, patch in merged(start, choice.patches).items():
            found[f"{path}.{inner}" if inner else path] = patch
    return found


def _judged(task: EmissionTask, recipe: Blueprint, chosen: Mapping[str, Choice]) -> Candidate:
    seen = task.rebuilder.observe(recipe.fields)
    wrong = mismatches(seen.shapes, task.outside()) if seen else frozenset()
    loose = {name for name, _ in wrong}
    gaps: list[str] = []
    for path, choice in chosen.items():
        if choice.gap:
            loose.update(f"{path}.{name}" for name in names_in(task.wanted, path))
            gaps += [f"block {path}: {line}" for line in choice.gap]
    return Candidate(recipe, frozenset(loose), tuple(gaps))
