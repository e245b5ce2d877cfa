"""Layout of a model: its lists of blocks, their config, and how to rebuild them on ``meta``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.snapshot import (
    Reads,
    Snapshot,
    block_entries,
    build_on_meta,
    keep_blocks,
    part_of,
    record_reads,
    take_snapshot,
    value_of,
)
from fxprune.graph.context import Refusal, call_foreign
from fxprune.graph.facts import within
from fxprune.modelling.blocks import BUILT_AT, builder_of, flags_of, put_fields
from fxprune.modelling.layerwise import SECTION, AnyWidths, Layerwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stock_class(module: nn.Module | type) -> type[Any]:
    """Class of a module, or a class, without the mixins of a pruned model and of torch's sharding."""
    own = module if isinstance(module, type) else type(module)

    def is_mixed(kind: type) -> bool:
        return issubclass(kind, Layerwise) or any(c.__module__.startswith("torch.distributed.") for c in kind.__mro__)

    return next(kind for kind in own.__mro__ if not is_mixed(kind))


def stock_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Class of a config without the mixins of a pruned model."""
    found: type[PreTrainedConfig] = next(c for c in config.__mro__ if not issubclass(c, AnyWidths))  # type: ignore[assignment]
    return found


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy of a model's config for its stock class, without the section of a pruned model."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.__class__ = stock_config(type(config))
    vars(config).pop(SECTION, None)
    return config


@dataclass(frozen=True)
class BlockStack:
    """A module list of blocks, by its module path, and the ``part`` of the config that it is built from, as a path."""

    path: str
    blocks: tuple[nn.Module, ...]
    part: str = ""

    def paths(self) -> tuple[str, ...]:
        return tuple(f"{self.path}.{index}" for index in range(len(self.blocks)))


Known: TypeAlias = dict[object, Any]
"""Findings about how the classes of one model are built, by subject; kept from one emission to the next."""


@dataclass(frozen=True)
class Layout:
    """Where blocks are in a model and which config they come from.

    Args:
        stacks: the outermost module lists, those of the text decoder first where there are others, the longest first.
        part: name of the nested config that describes the first stack; empty for the model's own.
    """

    model: PreTrainedModel
    known: Known
    stacks: tuple[BlockStack, ...] = ()
    part: str = ""

    @property
    def count_field(self) -> str | None:
        """The field that sets the length of the first stack.

        Empty if lists with one entry per block set it, None if nothing does. Models are built to find it.
        """
        if "count" not in self.known:
            self.known["count"] = self._count_field() if self.stacks else None
        return self.known["count"]  # type: ignore[no-any-return]

    def _count_field(self) -> str | None:
        total, path = self.depth, self.stacks[0].path
        fields = vars(part_of(self.model.config, self.part)).items()
        names = [name for name, value in fields if type(value) is int and value == total]
        for name, lists in [*((name, False) for name in names), ("", True), *((name, True) for name in names)]:
            for count in sorted({1, total - 1} - {0, total}):  # one block is soonest built, and some classes need more
                config = plain_config(self.model)
                if lists:
                    keep_blocks(part_of(config, self.part), name, total, range(count))
                else:
                    put_fields(part_of(config, self.part), {name: count})
                built = build_on_meta(stock_class(self.model), config)
                blocks = dict(built.named_modules()).get(path) if isinstance(built, nn.Module) else None
                if isinstance(blocks, nn.ModuleList) and len(blocks) == count:
                    return name
        return None

    @property
    def depth(self) -> int:
        return len(self.stacks[0].blocks) if self.stacks else 0

    def blocks(self) -> dict[str, tuple[int, nn.Module]]:
        """Index and module of every block by its module path."""
        return {
            path: (index, block)
            for stack in self.stacks
            for index, (path, block) in enumerate(zip(stack.paths(), stack.blocks, strict=True))
        }

    def built_at(self) -> dict[str, Any]:
        """Where blocks are built whose class builds another kind at their index, by module path."""
        return {path: vars(block)[BUILT_AT] for path, (_, block) in self.blocks().items() if BUILT_AT in vars(block)}


def find_layout(model: PreTrainedModel, known: Known | None = None) -> Layout:
    """Find the lists of blocks of a model and the config that describes them."""

    def config_of(stack: BlockStack) -> object:
        return vars(model.get_submodule(stack.path.rpartition(".")[0])).get("config")

    outer: dict[str, BlockStack] = {}  # the outermost module lists whose entries all have parameters
    for path, module in model.named_modules():
        blocks = tuple(module) if isinstance(module, nn.ModuleList) and not within(path, outer) else ()
        if blocks and all(next(block.parameters(), None) is not None for block in blocks):
            outer[path] = BlockStack(path, blocks)
    text = model.config.get_text_config(decoder=True)
    stacks = tuple(sorted(outer.values(), key=lambda stack: (config_of(stack) is not text, -len(stack.blocks))))
    known = {} if known is None else known
    if not stacks:
        return Layout(model, known)
    config = config_of(stacks[0])
    nested = (name for name, value in vars(model.config).items() if value is config)
    part = next(nested, "") if isinstance(config, PreTrainedConfig) else ""
    parts = {stack.path: _part(model.config, config_of(stack), part) for stack in stacks[1:]}
    stacks = tuple(replace(stack, part=parts.get(stack.path, part)) for stack in stacks)
    return Layout(model, known, stacks, part)


def _part(whole: PreTrainedConfig, config: object, default: str) -> str:
    """Path of the config nested in ``whole`` that is ``config``, or the only one of its class; else the default."""
    pending, found = [("", whole)], dict[str, PreTrainedConfig]()
    for path, here in pending:
        nested = [(f"{path}.{name}".strip("."), v) for name, v in vars(here).items() if isinstance(v, PreTrainedConfig)]
        pending.extend(nested)
        found.update((name, value) for name, value in nested if stock_config(type(value)) is type(config))
    same = [path for path, value in found.items() if value is config]
    return same[0] if same else next(iter(found)) if len(found) == 1 else default


@dataclass
class Rebuilder:
    """Builds one module again from config fields, and caches a snapshot for each assignment.

    Args:
        make: builds the module from an assignment of fields; may raise.
        config: the config that unassigned fields are read from.
        reads: the fields that the constructor looks at.
        skip: module paths whose subtrees are ignored.
    """

    make: Callable[[Mapping[str, int]], nn.Module]
    config: PreTrainedConfig
    reads: Reads
    skip: tuple[str, ...] = ()
    _seen: dict[frozenset[tuple[str, int]], Snapshot | None] = field(default_factory=dict)

    def build(self, fields: Mapping[str, int]) -> nn.Module | None:
        """Return the module built from an assignment; None if the constructor refuses it."""
        built = build_on_meta(self.make, fields)
        return None if isinstance(built, Refusal) else built

    def observe(self, fields: Mapping[str, int]) -> Snapshot | None:
        """Return a snapshot of the module built from an assignment, cached; None if the constructor refuses it."""
        key = frozenset(fields.items())
        if key not in self._seen:
            module = self.build(fields)
            self._seen[key] = None if module is None else take_snapshot(module, self.skip)
        return self._seen[key]

    def value(self, fields: Mapping[str, int], name: str) -> int | None:
        """Return the value of a field under an assignment; None if it is not an integer."""
        return fields[name] if name in fields else value_of(self.config, name)

    def known(self, fields: Mapping[str, int]) -> tuple[str, ...]:
        """Return the names of the fields that the constructor reads and that hold an integer under an assignment."""
        return tuple(dict.fromkeys((*self.reads.integers, *fields)))


def model_rebuilder(model: PreTrainedModel, layout: Layout, known: Known) -> Rebuilder:
    """Return the rebuilder of the model around its blocks, with as few blocks as its config allows."""
    if "model" in known:
        return known["model"]  # type: ignore[no-any-return]
    start, kind, part = plain_config(model), stock_class(model), layout.part
    if layout.count_field is not None:
        keep_blocks(part_of(start, part), layout.count_field, layout.depth, range(1))
    if isinstance(build_on_meta(kind, copy.deepcopy(start)), Refusal):
        start = plain_config(model)

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy.deepcopy(start)
        put_fields(part_of(config, part), fields)
        built: nn.Module = call_foreign(kind, config)
        return built

    def make_from(nested: PreTrainedConfig) -> nn.Module:
        config = copy.deepcopy(start)
        if part:
            vars(config)[part] = nested
        built: nn.Module = call_foreign(kind, config if part else nested)
        return built

    nested = part_of(start, part)
    skip = tuple(stack.path for stack in layout.stacks)
    found = known["model"] = Rebuilder(make, nested, record_reads(nested, make_from), skip)
    return found


def block_rebuilder(
    model: PreTrainedModel, part: str, depth: int, index: int, block: nn.Module, own: Mapping[str, int], known: Known
) -> Rebuilder | None:
    """Return the rebuilder of one block at its index in the dense model; None if its class cannot be called.

    It is one of ``depth`` that are described by a ``part`` of the config; ``own`` are the fields in which it already
    differs from the model's config.
    """
    built_at = vars(block).get(BUILT_AT)
    key = "block", type(block), str(built_at), str(flags_of(block)), part, depth, index, str(own)
    if key in known:
        return known[key]  # type: ignore[no-any-return]
    builder = builder_of(block, built_at)
    if builder is None:
        return None
    start = part_of(plain_config(model), part)

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy.deepcopy(start)
        put_fields(config, fields)
        return builder(config, index)

    entries = block_entries(start, depth, index)
    if entries:
        trial = Rebuilder(make, start, Reads((), ()))
        whole, alone = trial.observe({}), trial.observe(entries)
        if whole is not None and alone is not None and whole.shapes == alone.shapes:  # it reads no entries but its own
            put_fields(start, entries)
    put_fields(start, own)
    found = known[key] = Rebuilder(make, start, record_reads(start, lambda config: builder(config, index)))
    return found
