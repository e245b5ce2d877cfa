"""Emission: candidates assembled from choices for all blocks, built in the user's own class, and checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice, product
from typing import TYPE_CHECKING, Any, TypeAlias

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
    carry_over,
    composed_patches,
    epsilon_fields,
    leaf_patches,
    merged,
    numbers_of,
    patches_by_hand,
)
from fxprune.emit.snapshot import (
    Axis,
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
    use_eager_experts,
    without_storage,
)
from fxprune.emit.solve import Choice, SharedWidths, choices_for, shared_widths_for
from fxprune.emit.structure import KeptUnits, combined_inputs, find_inputs, remove_blocks
from fxprune.errors import VerificationError
from fxprune.graph.context import Refusal, attempt, call_foreign
from fxprune.graph.facts import within
from fxprune.graph.tensors import named_tensors
from fxprune.modelling.blocks import BUILT_AT, flags_of, put_fields
from fxprune.modelling.layerwise import OVERRIDES, Overrides, apply_overrides, build_blocks
from fxprune.trace.inputs import clear_quantisation_marks, meta_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    known: Known = field(default_factory=dict)

    def outside(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.wanted.items() if not within(name, self.rebuilder.skip)}

    def request(self) -> tuple[object, ...]:
        """All that decides how a slim model is built, besides the dense one."""
        return self.wanted, self.removed, self.kept_units, self.epsilons, self.resized


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
        parts = {path: stack.part for stack in layout.stacks for path in stack.paths()}
        build_blocks(model, lambda path: part_of(model.config, parts.get(path, layout.part)), overrides, like=dense)
    carry_over(dense, model)
    apply_overrides(model, overrides)
    remove_blocks(model, blueprint.removed, layout)
    put_fields(part_of(config, layout.part), blueprint.written_afterwards)
    clear_quantisation_marks(model)  # a traced model holds plain floats, whatever file it came from
    return model


def candidates_by_hand(task: EmissionTask, every: Iterable[Patches]) -> Iterator[Candidate]:
    """Yield candidates whose classes build the dense model, with attributes set by hand where tensors are resized."""
    wrong = frozenset(name for name, _ in mismatches(shapes_of(task.model), task.wanted) if name in task.wanted)
    built_at = {p: vars(b)[BUILT_AT] for p, (_, b) in task.layout.blocks().items() if BUILT_AT in vars(b)}
    gaps = (f"no config field sets {len(wrong)} shapes, such as that of {min(wrong, default='none')}",)
    for patches in every:
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


_Kind: TypeAlias = tuple[type, frozenset[Axis]]
"""The class of a block and the axes that change; blocks of one kind are built the same way."""


@dataclass(frozen=True)
class _Block:
    """A block that stays, with the ways to build it.

    Args:
        part: of the config that describes it.
        own: fields in which the dense block already differs from the model's config.
        kind: the class and the axes that change; blocks of one kind are built the same way.
        pending: the ways that were not asked for yet; their fields are added to ``own``.
        fields: for each kind, the names of the fields that its first block is built by; none if by attributes.
    """

    part: str
    own: Mapping[str, int]
    kind: _Kind
    rebuilder: Rebuilder | None
    pending: Iterator[Choice]
    fields: dict[_Kind, frozenset[str]]
    _found: list[Choice] = field(default_factory=list)

    def likeliest(self) -> Choice:
        if not self._found:
            self._found.append(next(self.pending))
            first = self._found[0]
            self.fields.setdefault(self.kind, frozenset(() if first.patches else first.fields))
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
    fields = dict[_Kind, frozenset[str]]()
    for path, (index, module) in task.layout.blocks().items():
        if path in task.removed:
            continue
        stack = task.layout.stack_of(path)
        whole = part_of(task.model.config, stack.part)
        config = next((vars(m)["config"] for m in module.modules() if "config" in vars(m)), whole)
        own: dict[str, int] = {}
        if config is not whole and isinstance(config, PreTrainedConfig):
            own = {k: v for k, v in vars(config).items() if type(v) in (int, bool) and vars(whole).get(k) != v}
        wanted, have = names_in(task.wanted, path), shapes_of(module)
        flags = flags_of(module)
        key = (type(module), stack.part, *(tuple(sorted(part.items())) for part in (own, flags, wanted, have)))
        if key not in made:
            made[key] = _block(task, shared, stack, (index, module), own, wanted, fields)
        found[path] = made[key]
    return found


def _block(
    task: EmissionTask,
    shared: SharedWidths,
    stack: BlockStack,
    at: tuple[int, nn.Module],
    own: Mapping[str, int],
    wanted: Mapping[str, Shape],
    fields: dict[_Kind, frozenset[str]],
) -> _Block:
    index, module = at
    is_first = stack.part == task.layout.part
    depth = task.layout.depth if is_first else len(stack.blocks)
    flags = {name: value for name, value in own.items() if type(value) is bool}
    own = {name: value for name, value in own.items() if name not in flags}
    rebuilder = block_rebuilder(task.model, stack.part, depth, index, module, own, task.known)
    if flags and not _builds(rebuilder, module):  # a flag may decide what a block consists of
        flagged = block_rebuilder(task.model, stack.part, depth, index, module, {**own, **flags}, task.known)
        if _builds(flagged, module):
            own, rebuilder = {**own, **flags}, flagged
    outside = task.outside()

    def harm(fields: Mapping[str, int]) -> int:
        if not is_first:
            return 0
        seen = task.rebuilder.observe({**shared.fields, **fields})
        return len(outside) if seen is None else len(mismatches(seen.shapes, outside))

    seen = rebuilder.observe({}) if rebuilder is not None else None
    if seen is not None:  # leave out the buffers that the model, not the block's class, adds to a block
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        wanted = {name: shape for name, shape in wanted.items() if name in seen.shapes or name not in buffers}
    bases = [shared.fields, {}] if shared.fields and is_first else [{}]
    kind = type(module), mismatches(shapes_of(module), wanted)
    choices = choices_for(module, rebuilder, bases, wanted, harm, lambda: fields.get(kind, frozenset()))
    return _Block(stack.part, own, kind, rebuilder, choices, fields)


def _builds(rebuilder: Rebuilder | None, block: nn.Module) -> bool:
    """Whether a block is built with the tensors that it has."""
    seen = None if rebuilder is None else rebuilder.observe({})
    return seen is not None and seen.shapes.keys() == shapes_of(block).keys()


def _candidate(
    task: EmissionTask, shared: SharedWidths, blocks: Mapping[str, _Block], chosen: Mapping[str, Choice]
) -> Candidate:
    fields, full = _with_adopted(task, shared, blocks, chosen)
    built, skip = task.rebuilder.build(fields), task.rebuilder.skip
    around = {} if built is None else leaf_patches(built, task.outside(), skip)
    dense = vars(part_of(task.model.config, task.layout.part))
    block_fields, absent = dict[str, dict[str, int]](), dict[str, list[str]]()
    for path, own in full.items():
        if blocks[path].part != task.layout.part:
            block_fields.update({path: own} if own else {})
            continue
        whole = {**dense, **fields}
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
    others = {path: own for path, own in full.items() if blocks[path].part != task.layout.part}
    full = {path: own for path, own in full.items() if path not in others}
    for name in sorted({name for own in full.values() for name in own} - fields.keys()):
        adopted = _adopted(name, blocks, full)
        if adopted is None:
            continue
        before, after = task.rebuilder.observe(fields), task.rebuilder.observe({**fields, name: adopted})
        harmless = before is after if before is None or after is None else before.shapes == after.shapes
        if harmless:
            fields[name] = adopted
            full = {path: {**own, name: adopted} for path, own in full.items()}
    return fields, full | others


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


_FITTED = "fitted"
"""Key in ``known`` of the latest request with a model, a :class:`_Fitted`."""

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
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    epsilons = epsilons or NormEpsilons()
    refused = _request_errors(model, layout, tensors, removed) or epsilons.reasons[:_MOST_REASONS]
    if refused:
        return Emission(None, refused)
    rebuilder = model_rebuilder(model, layout, known)
    task = EmissionTask(model, layout, rebuilder, wanted, removed, kept_units or {}, epsilons, tuple(resized), known)
    return _Emitter(task, tensors, agrees, inputs, dry).first_that_fits(DryRuns(partial(meta_twin, model), inputs))


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


_MOST_ALONE = 3
"""Attributes that are tried for each kind of group: a wrong number may run as well."""


def _start(one: Resized) -> int:
    """Where the names within the scope of ``one`` start in those of the model."""
    return len(one.scope) + bool(one.scope)


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A search for a candidate that fits a request, as far as it went.

    Args:
        candidate: the one that fitted.
        runs_dry: as in :class:`Emission`.
        rest: the candidates that come after it.
        doubtful: those before it that failed on ``meta``.
        reasons: why those before it did not fit, in order, each once.
    """

    request: tuple[object, ...]
    candidate: Candidate
    runs_dry: bool
    rest: Iterator[Candidate]
    doubtful: list[Candidate]
    reasons: dict[str, None]


@dataclass(frozen=True)
class _Emitter:
    task: EmissionTask
    tensors: Mapping[str, torch.Tensor]
    agrees: Agrees | None
    inputs: Mapping[str, Any] | None
    dry: bool

    def first_that_fits(self, runs: DryRuns) -> Emission:
        """Return the first candidate that fits; those that fail on ``meta`` are tried last.

        The candidate that fitted the latest request comes first if this is the same one, and the search goes on behind
        it. Which inputs are tables of all units is found anew, on the inputs of this request.
        """
        known, request = self.task.known, self.task.request()
        reasons, doubtful, rest = dict[str, None](), list[Candidate](), self.candidates()
        before: _Fitted | None = known.pop(_FITTED, None)
        if before is not None and before.request == request and not self.task.kept_units:
            made = self.make(before.candidate)
            if isinstance(made, transformers.PreTrainedModel):
                known[_FITTED] = before
                return Emission(made, runs_dry=before.runs_dry)
            reasons, doubtful, rest = {**before.reasons, **dict.fromkeys(made)}, before.doubtful, before.rest
        for candidate in rest:
            slim = self.built(candidate)
            if not isinstance(slim, transformers.PreTrainedModel):
                reasons.update(dict.fromkeys(slim))
                continue
            failure = self.failure(candidate, slim, runs)
            if failure is not None:
                others = divided_attributes(candidate, self.task.wanted)
                better = next((other for other in others if self.fits(other, runs)), None)
                failure, candidate = (failure, candidate) if better is None else (None, better)
            if failure is not None:
                reasons.update(dict.fromkeys((*candidate.gaps, f"a candidate does not run: {failure}")))
                doubtful.append(candidate)
                continue
            made = slim if self.dry else self.make(candidate)
            if isinstance(made, transformers.PreTrainedModel):
                known[_FITTED] = _Fitted(request, candidate, runs.show_failures, rest, doubtful, reasons)
                return Emission(made, runs_dry=runs.show_failures)
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
        for plain in chain(by_fields, candidates_by_hand(task, self.by_hand()) if task.resized else ()):
            attributes = {path: dict(own) for path, own in plain.blueprint.attributes.items()}
            for path, own in task.epsilons.attributes.items():
                attributes.setdefault(path, {}).update(own)
            blueprint = dataclasses.replace(plain.blueprint, attributes=attributes, epsilons=fields)
            for found in (*self.with_inputs(blueprint), blueprint):
                if found not in tried:
                    tried.append(found)
                    yield dataclasses.replace(plain, blueprint=found)

    def by_hand(self) -> Iterator[Patches]:
        """Yield attributes to set: all that may change; if several groups go, then those found for each alone."""
        task = self.task
        every = patches_by_hand(task.model, task.wanted, task.resized)
        if len(task.resized) == 1:
            yield from every
            return
        yield from islice(every, 1)
        alike: dict[object, list[Resized]] = {}
        for one in task.resized:
            inside = frozenset((name[_start(one) :], axis) for name, axis in one.axes)
            kind = type(task.model.get_submodule(one.scope))
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
            yield composed_patches(task.model, task.wanted, chosen)

    def alone(self, one: Resized) -> Iterator[Patches]:
        """Yield attributes with which the dense model runs if ``one`` alone goes, by paths within its scope."""
        model = self.task.model
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named_tensors(model)}
        for (name, axis), size in one.axes.items():
            tensors[name] = tensors[name].narrow(axis, 0, size)
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        task = dataclasses.replace(self.task, wanted=wanted, removed=(), epsilons=NormEpsilons(), resized=(one,))
        emitter = dataclasses.replace(self, task=task, tensors=tensors, agrees=None)
        runs = DryRuns(partial(meta_twin, model), self.inputs)
        for plain in candidates_by_hand(task, emitter.by_hand()):
            ways = (*emitter.with_inputs(plain.blueprint), plain.blueprint)
            if any(emitter.fits(dataclasses.replace(plain, blueprint=way), runs) for way in ways):
                yield {path[_start(one) :]: dict(own) for path, own in plain.blueprint.attributes.items()}

    def with_inputs(self, blueprint: Blueprint) -> Iterator[Blueprint]:
        """Yield the blueprint whose blocks select their rows of tables made for all units, if there are such."""
        task = self.task
        if not task.kept_units:
            return
        slim = build_on_meta(rebuild, task.model, dataclasses.replace(blueprint, removed=()), task.layout)
        if isinstance(slim, Refusal):
            return
        inputs = find_inputs(meta_twin(task.model), slim, task.layout, task.kept_units, self.inputs)
        if inputs:
            yield dataclasses.replace(blueprint, inputs=inputs)

    def rename(self, name: str) -> str | None:
        return slim_name(name, self.task.removed)

    def built(self, candidate: Candidate) -> PreTrainedModel | Reasons:
        """Return the model of a candidate without its tensors, or the reasons why it is not the wanted one."""
        slim = build_on_meta(rebuild, self.task.model, candidate.blueprint, self.task.layout)
        if isinstance(slim, Refusal):
            return (*candidate.gaps, f"a candidate cannot be built: {slim}")
        unfit = self.unfit(candidate, slim)
        return (*candidate.gaps, *unfit) if unfit else slim

    def fits(self, candidate: Candidate, runs: DryRuns) -> bool:
        """Whether a candidate can be built and runs on ``meta``."""
        slim = self.built(candidate)
        return isinstance(slim, transformers.PreTrainedModel) and self.failure(candidate, slim, runs) is None

    def failure(self, candidate: Candidate, slim: PreTrainedModel, runs: DryRuns) -> str | None:
        """Return why the model of a candidate, to be thrown away, does not run on ``meta``; None if it does."""
        copies = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in self.tensors.values()}
        tensors = {name: copies[id(tensor)] for name, tensor in self.tensors.items()}
        assign_tensors(slim, self.task.model, tensors, self.rename)
        return runs.failure_of(slim, patched=bool(candidate.blueprint.attributes))

    def unfit(self, candidate: Candidate, slim: PreTrainedModel) -> Reasons:
        loose = frozenset(new for name in candidate.loose if (new := self.rename(name)) is not None)
        errors = shape_errors(slim, self.tensors, self.rename, loose)
        there = {path for path, _ in slim.named_modules()}
        wanted = [new for path, _ in self.task.model.named_modules() if (new := self.rename(path)) is not None]
        return (*errors, *(f"{path}: the class builds no such module" for path in wanted if path not in there))

    def make(self, candidate: Candidate) -> PreTrainedModel | Reasons:
        """Return the model that a candidate gives, or the reasons why it is not the wanted one."""
        dense, blueprint = self.task.model, candidate.blueprint
        slim = self.built(candidate)
        if not isinstance(slim, transformers.PreTrainedModel):
            return slim
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
