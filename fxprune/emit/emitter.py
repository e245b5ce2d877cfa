"""Emission: candidates assembled from choices for all blocks, built in the user's own class, and checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, islice, product
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import (
    BlockStack,
    Known,
    Layout,
    Rebuilder,
    block_rebuilder,
    find_layout,
    model_rebuilder,
    plain_config,
    stock_class,
)
from fxprune.emit.patch import (
    NormEpsilons,
    Patches,
    Resized,
    by_module,
    carry_over,
    composed_patches,
    epsilon_fields,
    leaf_patches,
    patches_by_hand,
)
from fxprune.emit.snapshot import (
    DryRuns,
    Shape,
    assign_tensors,
    build_on_meta,
    mismatches,
    names_in,
    names_on_meta,
    part_of,
    shape_errors,
    shapes_of,
    slim_name,
    take_snapshot,
    use_eager_experts,
    without_storage,
)
from fxprune.emit.solve import Choice, SharedWidths, choices_for, shared_widths_for
from fxprune.emit.structure import KeptUnits, combined_inputs, find_inputs, remove_blocks
from fxprune.errors import VerificationError
from fxprune.graph.context import Refusal, attempt, call_foreign
from fxprune.graph.facts import within
from fxprune.graph.tensors import named_tensors
from fxprune.modelling.blocks import flags_of, put_fields
from fxprune.modelling.layerwise import OVERRIDES, Overrides, apply_overrides, build_blocks
from fxprune.trace.inputs import clear_quantisation_marks, meta_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        parts = {path: stack.part for stack in layout.stacks for path in stack.paths()}
        build_blocks(model, lambda path: part_of(model.config, parts.get(path, layout.part)), overrides, like=dense)
    carry_over(dense, model)
    apply_overrides(model, overrides)
    remove_blocks(model, blueprint.removed, layout)
    put_fields(part_of(config, layout.part), blueprint.written_afterwards)
    clear_quantisation_marks(model)  # a traced model holds plain floats, whatever file it came from
    return model


_LARGEST_QUOTIENT = 16
"""Attributes that are quotients of numbers of heads are small; larger ones are widths."""
_MOST_CANDIDATES = 24
"""Bounds the time for one choice of shared widths: each is built and run. The likeliest come first."""


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


def divided_attributes(candidate: Candidate, tensors: Collection[str]) -> Iterator[Candidate]:
    """Yield a candidate with one small integer attribute divided, in all modules where it is the same number.

    Where widths are set as attributes, an attribute of the module around them, such as how many queries share a key,
    may still be that of more heads: one attention kernel infers it from shapes, another reads it. The attributes of
    modules that own one of ``tensors`` are widths, which are right already.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    attributes = candidate.blueprint.attributes
    around = {path: own for path, own in attributes.items() if path not in owners}
    numbers = {(value, name) for own in around.values() for name, value in own.items() if isinstance(value, int)}
    for value, name in sorted(numbers):
        divisors = [n for n in range(1, value) if value % n == 0] if value <= _LARGEST_QUOTIENT else []
        for smaller in divisors:
            changed = {path: {**own, name: smaller} for path, own in around.items() if own.get(name) == value}
            blueprint = dataclasses.replace(candidate.blueprint, attributes={**attributes, **changed})
            yield dataclasses.replace(candidate, blueprint=blueprint)


@dataclass(frozen=True)
class _Block:
    """A block that stays, with the ways to build it: those asked for, the likeliest first, and those pending.

    Their fields are added to its ``own``, in which the dense block already differs from the model's config. Blocks of
    one kind, which is the class and the axes that change, are built the same way.
    """

    part: str
    own: Mapping[str, int]
    kind: object
    rebuilder: Rebuilder | None
    found: list[Choice]
    pending: Iterator[Choice]


def _builds(rebuilder: Rebuilder | None, block: nn.Module) -> bool:
    """Whether a block is built with the tensors that it has."""
    seen = None if rebuilder is None else rebuilder.observe({})
    return seen is not None and seen.shapes.keys() == shapes_of(block).keys()


_FITTED = "fitted"
"""Key in ``known`` of the latest request with a model: the request, its candidate, and whether that runs dry."""

Agrees = Callable[["PreTrainedModel"], bool]
"""Whether the outputs of an emitted model are right; a ``VerificationError`` is a no with its reason."""

Reasons = tuple[str, ...]

_MOST_REASONS = 12
"""Lines that a reader can still take in; the first are of the likeliest candidates."""


@dataclass(frozen=True)
class Emission:
    """A slim model, or why there is none.

    Args:
        model: of the dense model's class, holding the given tensors. Its attribute ``fxprune_overrides`` says how it
            differs: an ``Overrides`` with the config fields in which a block differs from ``model.config``, and those
            that the class needs at their dense values while it is built.
        reasons: block, parameter, wanted and obtained shape of what cannot be expressed; empty on success.
        runs_dry: whether the model, or the dense one, ran without storage; else only real tensors show whether it runs.
    """

    model: PreTrainedModel | None
    reasons: Reasons = ()
    runs_dry: bool = True


def emit(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    removed_blocks: Sequence[str] = (),
    agrees: Agrees | None = None,
    kept_units: KeptUnits | None = None,
    epsilons: NormEpsilons | None = None,
    inputs: Mapping[str, Any] | None = None,
    resized: Sequence[Resized] = (),
    known: Known | None = None,
    *,
    dry: bool = False,
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
        known: what earlier emissions of the same model found out; it is added to.
        dry: only to see whether there is one: the model has run without storage and is thrown away.
    """
    removed, known = tuple(removed_blocks), {} if known is None else known
    layout = attempt(find_layout, model, known)
    if isinstance(layout, Refusal):
        return Emission(None, (f"its blocks cannot be found: {layout}",))
    epsilons, blocks = epsilons or NormEpsilons(), layout.blocks()
    lines = [f"block {path}: not a block of this model" for path in removed if path not in blocks]
    if removed and layout.count_field is None:
        lines.append("blocks cannot be removed: no config field sets how many there are")
    lines += [f"{stack.path}: every block removed" for stack in layout.stacks if set(stack.paths()) <= set(removed)]
    names = {name for name in shapes_of(model) if not within(name, removed)}
    lines += [f"{name}: no tensor given for it" for name in sorted(names - tensors.keys())]
    lines += [f"{name}: the dense model has no such tensor" for name in sorted(tensors.keys() - names)]
    refused = lines or epsilons.reasons
    if refused:
        return Emission(None, tuple(refused[:_MOST_REASONS]))
    rebuilder, kept = model_rebuilder(model, layout, known), kept_units or {}
    more = (kept, epsilons, inputs, tuple(resized), known, dry)
    return _Emitter(model, layout, rebuilder, tensors, removed, agrees, *more).first_that_fits()


_MOST_ALONE = 3
"""Attributes that are tried for each kind of group: a wrong number may run as well."""


@dataclass(frozen=True, eq=False)
class _Emitter:
    """The search for a slim model, as :func:`emit` asks for it."""

    model: PreTrainedModel
    layout: Layout
    rebuilder: Rebuilder
    tensors: Mapping[str, torch.Tensor]
    removed: tuple[str, ...]
    agrees: Agrees | None
    kept_units: KeptUnits
    epsilons: NormEpsilons
    inputs: Mapping[str, Any] | None
    resized: tuple[Resized, ...]
    known: Known
    dry: bool

    @cached_property
    def wanted(self) -> dict[str, Shape]:
        """The shapes of the tensors, by dense name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @cached_property
    def outside(self) -> dict[str, Shape]:
        """The shapes of the tensors outside the blocks, by dense name."""
        return {name: shape for name, shape in self.wanted.items() if not within(name, self.rebuilder.skip)}

    @cached_property
    def runs(self) -> DryRuns:
        return DryRuns(partial(meta_twin, self.model), self.inputs)

    def first_that_fits(self) -> Emission:
        """Return the first candidate that fits; those that fail on ``meta`` are tried last.

        The candidate that fitted the latest request comes first if this is the same one. Which inputs are tables of all
        units is found anew, on the inputs of this request.
        """
        request = self.wanted, self.removed, self.kept_units, self.epsilons, self.resized
        reasons, doubtful, failed = dict[str, None](), list[Candidate](), list[Candidate]()
        before = self.known.pop(_FITTED, None)
        if before is not None and before[0] == request and not self.kept_units:
            made = self.make(before[1])
            if isinstance(made, transformers.PreTrainedModel):
                self.known[_FITTED] = before
                return Emission(made, runs_dry=before[2])
            failed.append(before[1])
            reasons.update(dict.fromkeys(made))
        for candidate in (one for one in self.candidates() if one not in failed):
            slim = self.built(candidate)
            if not isinstance(slim, transformers.PreTrainedModel):
                reasons.update(dict.fromkeys(slim))
                continue
            failure = self.failure(candidate, slim)
            if failure is not None:
                better = next((one for one in divided_attributes(candidate, self.wanted) if self.fits(one)), None)
                if better is None:
                    reasons.update(dict.fromkeys((*candidate.gaps, f"a candidate does not run: {failure}")))
                    doubtful.append(candidate)
                    continue
                candidate = better
            made = slim if self.dry else self.make(candidate)
            if isinstance(made, transformers.PreTrainedModel):
                self.known[_FITTED] = request, candidate, self.runs.show_failures
                return Emission(made, runs_dry=self.runs.show_failures)
            reasons.update(dict.fromkeys(made))
        for candidate in doubtful if self.agrees is not None else ():
            made = self.make(candidate)
            if isinstance(made, transformers.PreTrainedModel):
                return Emission(made)
        return Emission(None, tuple(reasons)[:_MOST_REASONS] or ("the model's class cannot be built from its config",))

    def candidates(self) -> Iterator[Candidate]:
        tried = list[Blueprint]()
        fields = epsilon_fields(self.model, self.layout.part, self.epsilons, self.removed)
        shared = shared_widths_for(self.rebuilder, self.outside)
        for plain in chain(chain.from_iterable(map(self.by_fields, shared)), self.by_attributes()):
            for found in self.with_inputs(dataclasses.replace(plain.blueprint, epsilons=fields)):
                if found not in tried:
                    tried.append(found)
                    yield dataclasses.replace(plain, blueprint=found)

    def by_fields(self, shared: SharedWidths) -> Iterator[Candidate]:
        """Yield candidates for one choice of shared widths, the likeliest first; at most a few dozen."""
        blocks = self.blocks(shared)
        yield self.assembled(shared, blocks, {path: block.found[0] for path, block in blocks.items()})
        counts = {block.kind: 0 for block in blocks.values()}
        for block in blocks.values():
            block.found.extend(block.pending)
            counts[block.kind] = max(counts[block.kind], len(block.found))
        picks = sorted(product(*(range(count) for count in counts.values())), key=sum)
        for pick in picks[1:_MOST_CANDIDATES]:
            rank = dict(zip(counts, pick, strict=True))
            chosen = {path: block.found[min(rank[block.kind], len(block.found) - 1)] for path, block in blocks.items()}
            yield self.assembled(shared, blocks, chosen)

    def blocks(self, shared: SharedWidths) -> dict[str, _Block]:
        """Return the blocks that stay; those of one class, config and shapes share one search."""
        made: dict[object, _Block] = {}
        likely: dict[object, frozenset[str]] = {}
        found: dict[str, _Block] = {}
        for path, (index, module) in self.layout.blocks().items():
            if path in self.removed:
                continue
            stack = next(stack for stack in self.layout.stacks if stack.path == path.rpartition(".")[0])
            whole = part_of(self.model.config, stack.part)
            config = next((vars(m)["config"] for m in module.modules() if "config" in vars(m)), whole)
            own: dict[str, int] = {}
            if config is not whole and isinstance(config, PreTrainedConfig):
                own = {k: v for k, v in vars(config).items() if type(v) in (int, bool) and vars(whole).get(k) != v}
            wanted = names_in(self.wanted, path)
            parts = own, flags_of(module), wanted, shapes_of(module)
            key = (type(module), stack.part, *(tuple(sorted(part.items())) for part in parts))
            if key not in made:
                made[key] = self.block(shared, stack, index, module, own, wanted, likely)
            found[path] = made[key]
        return found

    def block(
        self,
        shared: SharedWidths,
        stack: BlockStack,
        index: int,
        module: nn.Module,
        own: dict[str, int],
        wanted: Mapping[str, Shape],
        likely: dict[object, frozenset[str]],
    ) -> _Block:
        """Return a block with its likeliest way; ``likely`` has the fields by which the first of its kind is built."""
        is_main = stack.part == self.layout.part
        depth = self.layout.depth if is_main else len(stack.blocks)
        flags = {name: value for name, value in own.items() if type(value) is bool}
        own = {name: value for name, value in own.items() if name not in flags}
        rebuilder = block_rebuilder(self.model, stack.part, depth, index, module, own, self.known)
        if flags and not _builds(rebuilder, module):  # a flag may decide what a block consists of
            flagged = block_rebuilder(self.model, stack.part, depth, index, module, own | flags, self.known)
            if _builds(flagged, module):
                own, rebuilder = own | flags, flagged

        def harm(fields: Mapping[str, int]) -> int:
            if not is_main:
                return 0
            seen = self.rebuilder.observe({**shared.fields, **fields})
            return len(self.outside) if seen is None else len(mismatches(seen.shapes, self.outside))

        seen = rebuilder.observe({}) if rebuilder is not None else None
        if seen is not None:  # leave out the buffers that the model, not the block's class, adds to a block
            buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
            wanted = {name: shape for name, shape in wanted.items() if name in seen.shapes or name not in buffers}
        bases = [shared.fields, {}] if shared.fields and is_main else [{}]
        kind = type(module), mismatches(shapes_of(module), wanted)
        choices = choices_for(module, rebuilder, bases, wanted, harm, likely.get(kind, frozenset()))
        first = next(choices)
        likely.setdefault(kind, frozenset(() if first.patches else first.fields))
        return _Block(stack.part, own, kind, rebuilder, [first], choices)

    def assembled(self, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]) -> Candidate:
        """Return the candidate of some choices; fields that all blocks share are moved to the model."""
        full = {path: {**block.own, **chosen[path].fields} for path, block in blocks.items()}
        block_fields = {p: own for p, own in full.items() if own and blocks[p].part != self.layout.part}
        full = {path: own for path, own in full.items() if blocks[path].part == self.layout.part}
        fields = dict(shared.fields)
        for name in sorted({name for own in full.values() for name in own} - fields.keys()):
            value, *others = {own[name] for own in full.values() if name in own}
            rest = [(blocks[path].rebuilder, own) for path, own in full.items() if name not in own]
            if others or not all(r and r.observe({**own, name: value}) == r.observe(own) for r, own in rest):
                continue  # blocks differ in it, or one without it changes with it
            trials = map(self.rebuilder.observe, (fields, {**fields, name: value}))
            before, after = (None if seen is None else seen.shapes for seen in trials)
            if before == after:
                fields[name] = value
                full = {path: {**own, name: value} for path, own in full.items()}
        dense, absent = vars(part_of(self.model.config, self.layout.part)), dict[str, list[str]]()
        whole = {**dense, **fields}
        for path, own in full.items():
            # a block whose choice does not name a field of the model needs the dense value of that field
            held = {**{name: dense[name] for name in fields if name in dense}, **own}
            differing = {name: value for name, value in held.items() if whole.get(name) != value}
            lacking = sorted(fields.keys() - dense.keys() - own.keys())
            block_fields.update({path: differing} if differing else {})
            absent.update({path: lacking} if lacking else {})
        built, seen = self.rebuilder.build(fields), self.rebuilder.observe(fields)
        patches: Patches = {} if built is None else leaf_patches(built, self.outside, self.rebuilder.skip)
        loose = {name for name, _ in mismatches(seen.shapes, self.outside)} if seen else set[str]()
        gaps: list[str] = []
        for path, choice in chosen.items():
            start = take_snapshot(self.model.get_submodule(path)).numbers if choice.as_dense else {}
            for (inner, name), number in {**start, **choice.patches}.items():
                patches[f"{path}.{inner}".strip("."), name] = number
            if choice.gap:
                loose.update(f"{path}.{name}" for name in names_in(self.wanted, path))
                gaps += [f"block {path}: {line}" for line in choice.gap]
        blueprint = Blueprint(
            fields=fields,
            block_fields=block_fields,
            absent=absent,
            built_at=self.layout.built_at(),
            attributes=by_module({**patches, **self.epsilons.attributes}),
            removed=self.removed,
            built_with={name: dense[name] for name in shared.written_afterwards if name in dense},
            written_afterwards=shared.written_afterwards,
        )
        return Candidate(blueprint, frozenset(loose), tuple(gaps))

    def by_attributes(self) -> Iterator[Candidate]:
        """Yield candidates whose classes build the dense model, with attributes set by hand for resized tensors."""
        if not self.resized:
            return
        wrong = frozenset(name for name, _ in mismatches(shapes_of(self.model), self.wanted) if name in self.wanted)
        gaps = (f"no config field sets {len(wrong)} shapes, such as that of {min(wrong, default='none')}",)
        for patches in self.by_hand():
            attributes = by_module({**patches, **self.epsilons.attributes})
            blueprint = Blueprint(built_at=self.layout.built_at(), attributes=attributes, removed=self.removed)
            yield Candidate(blueprint, wrong, gaps)

    def by_hand(self) -> Iterator[Patches]:
        """Yield attributes to set: all that may change; if several groups go, then those found for each alone."""
        every = patches_by_hand(self.model, self.wanted, self.resized)
        if len(self.resized) == 1:
            yield from every
            return
        yield from islice(every, 1)
        alike: dict[object, list[Resized]] = {}
        for one in self.resized:
            inside = frozenset((one.inner(name), axis) for name, axis in one.axes)
            kind = type(self.model.get_submodule(one.scope))
            alike.setdefault((kind, tuple(one.sizes), inside), []).append(one)
        ways: list[list[Patches]] = []
        for same in alike.values():
            ways.append(list(islice(self.alone(same[0]), _MOST_ALONE)))
            if not ways[-1]:
                return
        picks: list[dict[int, int]] = [{}]
        picks += [{i: rank} for rank in range(1, _MOST_ALONE) for i, found in enumerate(ways) if rank < len(found)]
        for pick in picks[:_MOST_CANDIDATES]:
            chosen = [(one, ways[i][pick.get(i, 0)]) for i, same in enumerate(alike.values()) for one in same]
            yield composed_patches(self.model, self.wanted, chosen)

    def alone(self, one: Resized) -> Iterator[Patches]:
        """Yield attributes with which the dense model runs if ``one`` alone goes, by paths within its scope."""
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named_tensors(self.model)}
        for (name, axis), size in one.axes.items():
            tensors[name] = tensors[name].narrow(axis, 0, size)
        only: dict[str, Any] = {"removed": (), "epsilons": NormEpsilons(), "resized": (one,), "agrees": None}
        emitter = dataclasses.replace(self, tensors=tensors, **only)
        for plain in emitter.by_attributes():
            ways = emitter.with_inputs(plain.blueprint)
            if any(emitter.fits(dataclasses.replace(plain, blueprint=way)) for way in ways):
                found = plain.blueprint.attributes.items()
                yield {(one.inner(path), name): value for path, own in found for name, value in own.items()}

    def with_inputs(self, blueprint: Blueprint) -> list[Blueprint]:
        """The blueprint, after one whose blocks select their rows of tables made for all units, if there are such."""
        whole = dataclasses.replace(blueprint, removed=())
        slim = build_on_meta(rebuild, self.model, whole, self.layout) if self.kept_units else None
        if slim is None or isinstance(slim, Refusal):
            return [blueprint]
        inputs = find_inputs(meta_twin(self.model), slim, self.layout, self.kept_units, self.inputs)
        return [dataclasses.replace(blueprint, inputs=inputs), blueprint] if inputs else [blueprint]

    def rename(self, name: str) -> str | None:
        return slim_name(name, self.removed)

    def built(self, candidate: Candidate) -> PreTrainedModel | Reasons:
        """Return the model of a candidate without its tensors, or the reasons why it is not the wanted one."""
        slim = build_on_meta(rebuild, self.model, candidate.blueprint, self.layout)
        if isinstance(slim, Refusal):
            return (*candidate.gaps, f"a candidate cannot be built: {slim}")
        loose = frozenset(new for name in candidate.loose if (new := self.rename(name)) is not None)
        errors = shape_errors(slim, self.tensors, self.rename, loose)
        there = {path for path, _ in slim.named_modules()}
        wanted = [new for path, _ in self.model.named_modules() if (new := self.rename(path)) is not None]
        errors += [f"{path}: the class builds no such module" for path in wanted if path not in there]
        return (*candidate.gaps, *errors) if errors else slim

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate can be built and runs on ``meta``."""
        slim = self.built(candidate)
        return isinstance(slim, transformers.PreTrainedModel) and self.failure(candidate, slim) is None

    def failure(self, candidate: Candidate, slim: PreTrainedModel) -> str | None:
        """Return why the model of a candidate, to be thrown away, does not run on ``meta``; None if it does."""
        copies = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in self.tensors.values()}
        tensors = {name: copies[id(tensor)] for name, tensor in self.tensors.items()}
        assign_tensors(slim, self.model, tensors, self.rename)
        return self.runs.failure_of(slim, patched=bool(candidate.blueprint.attributes))

    def make(self, candidate: Candidate) -> PreTrainedModel | Reasons:
        """Return the model that a candidate gives, or the reasons why it is not the wanted one."""
        blueprint, slim = candidate.blueprint, self.built(candidate)
        if not isinstance(slim, transformers.PreTrainedModel):
            return slim
        assign_tensors(slim, self.model, self.tensors, self.rename)
        use_eager_experts(slim)
        empty = names_on_meta(slim)
        if empty and not any(tensor.is_meta for tensor in self.tensors.values()):
            return tuple(f"{name}: left without storage" for name in empty)
        if hasattr(self.model, "generation_config"):
            slim.generation_config = copy.deepcopy(self.model.generation_config)
        # by names of the slim model: what cannot be read off it afterwards
        paths = self.layout.stacks[0].paths() if self.layout.stacks else ()
        names = {new: path for path in paths if (new := self.rename(path)) is not None}
        fields, absent = blueprint.block_fields, blueprint.absent
        vars(slim)[OVERRIDES] = Overrides(
            block_fields={new: dict(fields[path]) for new, path in names.items() if path in fields},
            absent={new: list(absent[path]) for new, path in names.items() if path in absent},
            built_with=dict(blueprint.built_with),
        )
        disagreement = self.disagreement(blueprint, slim)
        return slim if disagreement is None else (*candidate.gaps, disagreement)

    def disagreement(self, blueprint: Blueprint, slim: PreTrainedModel) -> str | None:
        """The fault that the check of a slim model's outputs finds; None for no fault."""
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
