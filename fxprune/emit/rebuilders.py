"""What can be built again from config fields: the whole model, and each of its blocks, on ``meta``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import Reads, keep_blocks, own_entries, part_of, record_reads, value_of
from fxprune.emit.layout import Layout
from fxprune.emit.meta import build_on_meta
from fxprune.emit.snapshot import Snapshot, take_snapshot
from fxprune.graph.attempts import Refusal, call_foreign
from fxprune.modelling.block_config import put_fields
from fxprune.modelling.blocks import builder_of

__all__ = ["Rebuilder", "block_rebuilder", "model_rebuilder"]


@dataclass
class Rebuilder:
    """Builds one module again from config fields, and remembers what each assignment gave.

    Args:
        make: builds the module from an assignment of fields; may raise.
        config: the config that unassigned fields are read from.
        reads: the fields that the constructor looks at.
        skip: module paths whose subtrees do not count.
    """

    make: Callable[[Mapping[str, int]], nn.Module]
    config: PreTrainedConfig
    reads: Reads
    skip: tuple[str, ...] = ()
    _seen: dict[frozenset[tuple[str, int]], Snapshot | None] = field(default_factory=dict)

    def build(self, fields: Mapping[str, int]) -> nn.Module | None:
        """Return the module that an assignment gives; None where the constructor refuses it."""
        built = build_on_meta(self.make, fields)
        return None if isinstance(built, Refusal) else built

    def observe(self, fields: Mapping[str, int]) -> Snapshot | None:
        """Return what an assignment gives, remembered; None where the constructor refuses it."""
        key = frozenset(fields.items())
        if key not in self._seen:
            module = self.build(fields)
            self._seen[key] = None if module is None else take_snapshot(module, self.skip)
        return self._seen[key]

    def value(self, fields: Mapping[str, int], name: str) -> int | None:
        """Return the value a field has under an assignment."""
        return fields[name] if name in fields else value_of(self.config, name)

    def known(self, fields: Mapping[str, int]) -> tuple[str, ...]:
        """Return the names of the fields that hold an integer under an assignment."""
        return tuple(dict.fromkeys((*self.reads.integers, *fields)))


def model_rebuilder(model: PreTrainedModel, layout: Layout) -> Rebuilder:
    """Return what builds the model around its blocks, with as few of them as its config allows."""
    start = copy.deepcopy(model.config)
    if layout.count_field is not None:
        keep_blocks(part_of(start, layout.part), layout.count_field, layout.depth, range(1))
    if isinstance(build_on_meta(type(model), copy.deepcopy(start)), Refusal):
        start = copy.deepcopy(model.config)

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy.deepcopy(start)
        put_fields(part_of(config, layout.part), fields)
        return call_foreign(type(model), config)

    def make_from(nested: PreTrainedConfig) -> nn.Module:
        config = copy.deepcopy(start)
        if layout.part:
            vars(config)[layout.part] = nested
        return call_foreign(type(model), config if layout.part else nested)

    nested = part_of(start, layout.part)
    return Rebuilder(make, nested, record_reads(nested, make_from), tuple(stack.path for stack in layout.stacks))


def block_rebuilder(
    model: PreTrainedModel, layout: Layout, index: int, block: nn.Module, own: Mapping[str, int]
) -> Rebuilder | None:
    """Return what builds one block, with the index it has in the dense model; None where its class cannot be called.

    Args:
        model: the dense model.
        layout: where its blocks are.
        index: the block's index.
        block: the dense block.
        own: fields in which the block already differs from the model's config.
    """
    builder = builder_of(block)
    if builder is None:
        return None
    start = copy.deepcopy(part_of(model.config, layout.part))

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy.deepcopy(start)
        put_fields(config, fields)
        return builder(config, index)

    entries = own_entries(start, layout.depth, index)
    if entries:
        trial = Rebuilder(make, start, Reads((), ()))
        whole, alone = trial.observe({}), trial.observe(entries)
        if whole is not None and alone is not None and whole.shapes == alone.shapes:  # it reads its own entries alone
            put_fields(start, entries)
    put_fields(start, own)
    return Rebuilder(make, start, record_reads(start, lambda config: builder(config, index)))
