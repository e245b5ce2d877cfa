"""A slim model as data, the blueprint; and candidates assembled from choices for all blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.blocks import KeptUnits, combined_inputs, remove_blocks
from fxprune.emit.choices import Choice, SharedWidths, choices_for
from fxprune.emit.epsilons import NormEpsilons
from fxprune.emit.layout import Layout, Rebuilder, block_rebuilder, find_layout, plain_config, stock_class
from fxprune.emit.patch import Patches, Resized, carry_over, merged, numbers_of, patches_by_hand
from fxprune.emit.snapshot import Axis, Shape, mismatches, names_in, part_of, shapes_of, without_storage
from fxprune.graph.context import call_foreign
from fxprune.graph.facts import within
from fxprune.modelling.block_config import put_fields
from fxprune.modelling.blocks import BUILT_AT, flags_of
from fxprune.modelling.overrides import Overrides, apply_overrides, build_blocks
from fxprune.trace.checks import clear_quantisation_marks
from fxprune.trace.inputs import meta_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Blueprint",
    "Candidate",
    "EmissionTask",
    "candidates_by_hand",
    "candidates_for",
    "divided_attributes",
    "rebuild",
]


@dataclass(frozen=True)
class EmissionTask:
    """A dense model and the shapes, by dense name, that are wanted of the tensors of the slim one."""

    model: PreTrainedModel
    layout: Layout
    rebuilder: Rebuilder
    wanted: Mapping[str, Shape]
    removed: tuple[str, ...] = ()
    kept_units: KeptUnits = field(default_factory=dict)
    epsilons: NormEpsilons = field(default_factory=NormEpsilons)
    resized: tuple[Resized, ...] = ()

    def outside(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.wanted.items() if not within(name, self.rebuilder.skip)}


@dataclass(frozen=True)
class Blueprint(Overrides):
    """How a slim model is built from the dense config; JSON values throughout, names are those of the dense model.

    Args:
        fields: config fields that change for the whole model.
        epsilons: config fields with norm epsilons, of those that change.
    """

    fields: Mapping[str, int] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "removed": list(self.removed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Blueprint:
        """Return the blueprint from the values of ``as_dict``, also after a trip through JSON."""
        return cls(**{**data, "removed": tuple(data["removed"])})


def rebuild(dense: PreTrainedModel, blueprint: Blueprint, layout: Layout | None = None) -> PreTrainedModel:
    """Build a model of the dense model's class on ``meta`` with the widths and blocks of a blueprint, without weights.

    Of the dense model, which may be on ``meta``, only the structure and scalar attributes are read.

    Raises:
        CannotBuildError: the class of a block does not build what the blueprint asks for.
    """
    layout = layout or find_layout(dense)
    built_at = {path: place for path, place in blueprint.built_at.items() if path not in blueprint.removed}
    overrides = dataclasses.replace(blueprint, built_at=built_at, inputs=combined_inputs(dense, blueprint.inputs))
    with without_storage():
        config = plain_config(dense)
        put_fields(part_of(config, layout.part), {**blueprint.fields, **blueprint.epsilons})
        model: PreTrainedModel = call_foreign(stock_class(dense), config)
        build_blocks(model, part_of(model.config, layout.part), overrides, like=dense)
    carry_over(dense, model)
    apply_overrides(model, overrides)
    remove_blocks(model, blueprint.removed, layout)
    put_fields(part_of(config, layout.part), blueprint.written_afterwards)
    clear_quantisation_marks(model)  # a traced model holds plain floats, whatever file it came from
    return model


def candidates_by_hand(task: EmissionTask) -> Iterator[Candidate]:
    """Yield candidates whose classes build the dense model, with attributes set by hand where tensors are resized."""
    model = meta_twin(task.model)
    wrong = frozenset(name for name, _ in mismatches(shapes_of(model), task.wanted) if name in task.wanted)
    built_at = {p: vars(b)[BUILT_AT] for p, (_, b) in task.layout.blocks().items() if BUILT_AT in vars(b)}
    gaps = (f"no config field sets {len(wrong)} shapes, such as that of {min(wrong, default='none')}",)
    for patches in patches_by_hand(model, task.wanted, task.resized):
        blueprint = Blueprint(built_at=built_at, attributes=patches, removed=task.removed)
        yield Candidate(blueprint, wrong, gaps)


_LARGEST_QUOTIENT = 16
"""Attributes that are quotients of numbers of heads are small; larger ones are widths."""
_MOST_CANDIDATES = 24
"""Bounds the time for one choice of shared widths: each is built and run. The likeliest come first."""


def divided_attributes(candidate: Candidate, tensors: Collection[str]) -> Iterator[Candidate]:
    """Yield a candidate with one small integer attribute divided, in all modules where it is the same number.

    Where widths are set as attributes, an attribute of the module around them, such as how many queries share a key,
    may still be that of more heads: one attention kernel infers it from shapes, another reads it. The attributes of
    modules that own one of ``tensors`` are widths, which are right already.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    attributes = candidate.blueprint.attributes
    found = {
        (value, name)
        for path, here in attributes.items()
        for name, value in here.items()
        if path not in owners and isinstance(value, int) and 1 < value <= _LARGEST_QUOTIENT
    }
    for value, name in sorted(found):
        for smaller in (n for n in range(1, value) if value % n == 0):
            changed = {
                path: {**here, name: smaller} if path not in owners and here.get(name) == value else here
                for path, here in attributes.items()
            }
            yield dataclasses.replace(candidate, blueprint=dataclasses.replace(candidate.blueprint, attributes=changed))


@dataclass(frozen=True)
class Candidate:
    """A blueprint, and its known gaps before it is tried.

    Args:
        loose: dense names whose shapes the class does not give: attributes were set to fit.
        gaps: the tensors that config fields alone do not reach, in words.
    """

    blueprint: Blueprint
    loose: frozenset[str]
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """A block that stays, with the ways to build it.

    Args:
        own: fields in which the dense block already differs from the model's config.
        kind: the class and the axes that change; blocks of one kind are built the same way.
        pending: the ways that were not asked for yet; their fields are added to ``own``.
    """

    own: Mapping[str, int]
    kind: tuple[type, frozenset[Axis]]
    rebuilder: Rebuilder | None
    pending: Iterator[Choice]
    _found: list[Choice] = field(default_factory=list)

    def likeliest(self) -> Choice:
        if not self._found:
            self._found.append(next(self.pending))
        return self._found[0]

    def choices(self) -> list[Choice]:
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
    """Return the blocks that stay; those of one class, config and shapes share one search."""
    made: dict[object, _Block] = {}
    found: dict[str, _Block] = {}
    whole = part_of(task.model.config, task.layout.part)
    for path, (index, module) in task.layout.blocks().items():
        if path in task.removed:
            continue
        config = next((vars(m)["config"] for m in module.modules() if "config" in vars(m)), whole)
        own: dict[str, int] = {}
        if config is not whole and isinstance(config, PreTrainedConfig):
            own = {k: v for k, v in vars(config).items() if type(v) in (int, bool) and vars(whole).get(k) != v}
        wanted, have = names_in(task.wanted, path), shapes_of(module)
        flags = flags_of(module)
        key = (type(module), *(tuple(sorted(part.items())) for part in (own, flags, wanted, have)))
        if key not in made:
            made[key] = _block(task, shared, (index, module), own, wanted)
        found[path] = made[key]
    return found


def _block(
    task: EmissionTask,
    shared: SharedWidths,
    at: tuple[int, nn.Module],
    own: Mapping[str, int],
    wanted: Mapping[str, Shape],
) -> _Block:
    index, module = at
    flags = {name: value for name, value in own.items() if type(value) is bool}
    own = {name: value for name, value in own.items() if name not in flags}
    rebuilder = block_rebuilder(task.model, task.layout, index, module, own)
    if flags and not _builds(rebuilder, module):  # a flag may decide what a block consists of
        flagged = block_rebuilder(task.model, task.layout, index, module, {**own, **flags})
        if _builds(flagged, module):
            own, rebuilder = {**own, **flags}, flagged
    outside = task.outside()

    def harm(fields: Mapping[str, int]) -> int:
        seen = task.rebuilder.observe({**shared.fields, **fields})
        return len(outside) if seen is None else len(mismatches(seen.shapes, outside))

    seen = rebuilder.observe({}) if rebuilder is not None else None
    if seen is not None:  # leave out the buffers that the model, not the block's class, adds to a block
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        wanted = {name: shape for name, shape in wanted.items() if name in seen.shapes or name not in buffers}
    bases = [shared.fields, {}] if shared.fields else [{}]
    choices = choices_for(module, rebuilder, bases, wanted, harm)
    return _Block(own, (type(module), mismatches(shapes_of(module), wanted)), rebuilder, choices)


def _builds(rebuilder: Rebuilder | None, block: nn.Module) -> bool:
    """Whether a block is built with the tensors that it has."""
    seen = None if rebuilder is None else rebuilder.observe({})
    return seen is not None and seen.shapes.keys() == shapes_of(block).keys()


def _candidate(
    task: EmissionTask, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]
) -> Candidate:
    fields, full = _with_adopted(task, shared, blocks, chosen)
    extra = {name: value for name, value in fields.items() if name not in shared.fields}
    around = shared.patches(task.rebuilder, task.outside(), extra)
    dense = vars(part_of(task.model.config, task.layout.part))
    whole = {**dense, **fields}
    block_fields, absent = dict[str, dict[str, int]](), dict[str, list[str]]()
    for path, own in full.items():
        # a block whose choice does not name a field of the model needs the dense value of that field
        held = {**{name: dense[name] for name in fields if name in dense}, **own}
        differing = {name: value for name, value in held.items() if whole.get(name) != value}
        lacking = sorted(fields.keys() - dense.keys() - own.keys())
        block_fields.update({path: differing} if differing else {})
        absent.update({path: lacking} if lacking else {})
    attributes: Patches = {}
    for path, choice in chosen.items():
        start = numbers_of(task.model.get_submodule(path)) if choice.as_dense else {}
        for inner, patch in merged(start, choice.patches).items():
            attributes[f"{path}.{inner}" if inner else path] = patch
    blueprint = Blueprint(
        fields=fields,
        block_fields=block_fields,
        absent=absent,
        built_at={p: vars(b)[BUILT_AT] for p, (_, b) in task.layout.blocks().items() if BUILT_AT in vars(b)},
        attributes={**attributes, **around},
        removed=task.removed,
        built_with={name: dense[name] for name in shared.written_afterwards if name in dense},
        written_afterwards=shared.written_afterwards,
    )
    seen = task.rebuilder.observe(fields)
    loose = {name for name, _ in mismatches(seen.shapes, task.outside())} if seen else set[str]()
    gaps: list[str] = []
    for path, choice in chosen.items():
        if choice.gap:
            loose.update(f"{path}.{name}" for name in names_in(task.wanted, path))
            gaps += [f"block {path}: {line}" for line in choice.gap]
    return Candidate(blueprint, frozenset(loose), tuple(gaps))


def _with_adopted(
    task: EmissionTask, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the fields of the whole model and of each block; fields that all blocks share are moved to the model."""
    full = {path: {**block.own, **chosen[path].fields} for path, block in blocks.items()}
    fields = dict(shared.fields)
    for name in sorted({name for own in full.values() for name in own} - fields.keys()):
        adopted = _adopted(name, blocks, full)
        if adopted is None:
            continue
        before, after = task.rebuilder.observe(fields), task.rebuilder.observe({**fields, name: adopted})
        harmless = before is after if before is None or after is None else before.shapes == after.shapes
        if harmless:
            fields[name] = adopted
            full = {path: {**own, name: adopted} for path, own in full.items()}
    return fields, full


def _adopted(name: str, blocks: Mapping[str, _Block], full: Mapping[str, Mapping[str, int]]) -> int | None:
    """Return the value of a field that all blocks have or are indifferent to; None if there is none."""
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
