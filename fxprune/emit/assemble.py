"""Choices for all blocks are put together into recipes, one candidate model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.choices import Choice, choices_for
from fxprune.emit.fields import part_of
from fxprune.emit.frame import Frame
from fxprune.emit.layout import Layout
from fxprune.emit.patch import Patches, merged, numbers_of
from fxprune.emit.recipe import Recipe
from fxprune.emit.sites import Site, block_site
from fxprune.emit.snapshot import Axis, Shape, mismatches, shapes_of
from fxprune.emit.tables import Numbered

__all__ = ["Bench", "Block", "Candidate", "candidates_for", "local"]

_MOST_CANDIDATES = 24


def local(shapes: Mapping[str, Shape], path: str) -> dict[str, Shape]:
    """Shapes by name within a module."""
    prefix = f"{path}."
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Bench:
    """What every candidate is made from.

    Attributes:
        model: The dense model.
        layout: Where its blocks are.
        site: Rebuilds it around its blocks.
        wanted: Shape by dense name of every tensor that remains.
        removed: Module paths of the blocks that are gone.
        numbered: Which units remain of those that the model knows by number.
    """

    model: PreTrainedModel
    layout: Layout
    site: Site
    wanted: Mapping[str, Shape]
    removed: tuple[str, ...]
    numbered: Numbered = field(default_factory=dict)

    def outside(self) -> dict[str, Shape]:
        """Wanted shapes outside the blocks."""
        prefixes = tuple(f"{path}." for path in self.site.skip)
        return {name: shape for name, shape in self.wanted.items() if not (prefixes and name.startswith(prefixes))}


@dataclass(frozen=True)
class Block:
    """A block that stays, with the ways to build it.

    Attributes:
        own: Fields in which the dense block already differs from the model's config.
        kind: The class and the axes that change; blocks of one kind are built the same way.
        choices: Ways to build it; their fields come on top of `own`.
        site: Rebuilds it; None where its class cannot be called.
    """

    own: Mapping[str, int]
    kind: tuple[type, frozenset[Axis]]
    choices: list[Choice]
    site: Site | None


@dataclass(frozen=True)
class Candidate:
    """A recipe, and what is known about it before it is tried.

    Attributes:
        recipe: How to build the model.
        loose: Dense names whose shapes the class does not give: attributes were set to fit.
        gaps: What config fields alone do not reach, in words.
    """

    recipe: Recipe
    loose: frozenset[str]
    gaps: tuple[str, ...]


def candidates_for(bench: Bench, frame: Frame) -> Iterator[Candidate]:
    """Candidate models for one choice of shared widths, the likeliest first; at most a few dozen."""
    blocks = _blocks(bench, frame)
    kinds = {block.kind: 0 for block in blocks.values()}
    for block in blocks.values():
        kinds[block.kind] = max(kinds[block.kind], len(block.choices))
    picks = sorted(product(*(range(count) for count in kinds.values())), key=sum)
    for pick in picks[:_MOST_CANDIDATES]:
        rank = dict(zip(kinds, pick, strict=True))
        chosen = {path: block.choices[min(rank[block.kind], len(block.choices) - 1)] for path, block in blocks.items()}
        yield _candidate(bench, frame, blocks, chosen)


def _blocks(bench: Bench, frame: Frame) -> dict[str, Block]:
    made: dict[object, Block] = {}
    found: dict[str, Block] = {}
    whole = part_of(bench.model.config, bench.layout.part)
    for path, (index, module) in bench.layout.blocks().items():
        if path in bench.removed:
            continue
        own = _own_fields(module, whole)
        wanted, have = local(bench.wanted, path), shapes_of(module)
        key = (type(module), *(tuple(sorted(part.items())) for part in (own, wanted, have)))
        if key not in made:
            made[key] = _block(bench, frame, (index, module), own, wanted)
        found[path] = made[key]
    return found


def _own_fields(block: nn.Module, whole: PreTrainedConfig) -> dict[str, int]:
    config = next((vars(module)["config"] for module in block.modules() if "config" in vars(module)), whole)
    if config is whole or not isinstance(config, PreTrainedConfig):
        return {}
    return {k: v for k, v in vars(config).items() if type(v) is int and vars(whole).get(k) != v}


def _block(
    bench: Bench, frame: Frame, at: tuple[int, nn.Module], own: Mapping[str, int], wanted: Mapping[str, Shape]
) -> Block:
    index, module = at
    site = block_site(bench.model, bench.layout, index, module, own)
    outside = bench.outside()

    def harm(fields: Mapping[str, int]) -> int:
        seen = bench.site.observe({**frame.fields, **fields})
        return len(outside) if seen is None else len(mismatches(seen.shapes, outside))

    wanted = _built_by(module, site, wanted)
    bases = [frame.fields, {}] if frame.fields else [{}]
    choices = choices_for(module, site, bases, wanted, harm)
    return Block(own, (type(module), mismatches(shapes_of(module), wanted)), choices, site)


def _built_by(module: nn.Module, site: Site | None, wanted: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Wanted shapes less those of buffers that the model, not the block's class, adds to a block."""
    seen = site.observe({}) if site is not None else None
    if seen is None:
        return wanted
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: shape for name, shape in wanted.items() if name in seen.shapes or name not in buffers}


def _candidate(bench: Bench, frame: Frame, blocks: Mapping[str, Block], chosen: Mapping[str, Choice]) -> Candidate:
    full = {path: {**block.own, **chosen[path].fields} for path, block in blocks.items()}
    shared = dict(frame.fields)
    for name in sorted({name for fields in full.values() for name in fields} - shared.keys()):
        adopted = _adopted(name, blocks, full)
        if adopted is not None and _harmless(bench, shared, {name: adopted}):
            shared[name] = adopted
            full = {path: {**fields, name: adopted} for path, fields in full.items()}
    attributes: Patches = {}
    for path, choice in chosen.items():
        start = numbers_of(bench.model.get_submodule(path)) if choice.as_dense else {}
        for inner, patch in merged(start, choice.patches).items():
            attributes[f"{path}.{inner}" if inner else path] = patch
    extra = {name: value for name, value in shared.items() if name not in frame.fields}
    outside = bench.outside()
    attributes.update(frame.patches(bench.site, outside, extra))
    recipe = Recipe(
        shared,
        {path: fields for path, fields in full.items() if fields != shared},
        attributes,
        bench.removed,
        frame.noted,
    )
    return _judged(bench, recipe, outside, chosen)


def _judged(bench: Bench, recipe: Recipe, outside: Mapping[str, Shape], chosen: Mapping[str, Choice]) -> Candidate:
    seen = bench.site.observe(recipe.fields)
    wrong = mismatches(seen.shapes, outside) if seen else frozenset()
    loose = {name for name, _ in wrong}
    gaps: list[str] = []
    for path, choice in chosen.items():
        if choice.gap:
            loose.update(name for name in bench.wanted if name.startswith(f"{path}."))
            gaps += [f"layer {path}: {line}" for line in choice.gap]
    return Candidate(recipe, frozenset(loose), tuple(gaps))


def _adopted(name: str, blocks: Mapping[str, Block], full: Mapping[str, Mapping[str, int]]) -> int | None:
    """The value that all blocks have for a field, or do not care about."""
    values = {fields[name] for fields in full.values() if name in fields}
    if len(values) != 1:
        return None
    value = values.pop()
    for path, fields in full.items():
        site = blocks[path].site
        if name in fields:
            continue
        if site is None or site.observe({**fields, name: value}) != site.observe(fields):
            return None
    return value


def _harmless(bench: Bench, shared: Mapping[str, int], more: Mapping[str, int]) -> bool:
    before, after = bench.site.observe(shared), bench.site.observe({**shared, **more})
    if before is None or after is None:
        return before is after
    return before.shapes == after.shapes
