"""Places a model is rebuilt at: the whole model, and each of its blocks, on `meta` from a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import Reads, copy_config, keep_layers, part_of, record_reads, value_of, write_fields
from fxprune.emit.layout import Layout, on_meta
from fxprune.emit.snapshot import Snapshot, take_snapshot
from fxprune.layerwise import block_builder

__all__ = ["Site", "block_site", "model_site"]


@dataclass
class Site:
    """One thing that can be rebuilt from config fields, with a memory of what each assignment gave.

    Attributes:
        make: Builds the module from an assignment of fields; may raise.
        config: The config that unassigned fields are read from.
        reads: The fields that the constructor looks at.
        skip: Module paths whose subtrees do not count.
    """

    make: Callable[[Mapping[str, int]], nn.Module]
    config: PreTrainedConfig
    reads: Reads
    skip: tuple[str, ...] = ()
    _seen: dict[frozenset[tuple[str, int]], Snapshot | None] = field(default_factory=dict)

    def build(self, fields: Mapping[str, int]) -> nn.Module | None:
        """The module that an assignment gives; None where the constructor refuses it."""
        try:
            with on_meta():
                return self.make(fields)
        except Exception:
            return None

    def observe(self, fields: Mapping[str, int]) -> Snapshot | None:
        """What an assignment gives; None where the constructor refuses it. Remembered."""
        key = frozenset(fields.items())
        if key not in self._seen:
            module = self.build(fields)
            self._seen[key] = None if module is None else take_snapshot(module, self.skip)
        return self._seen[key]

    def value(self, fields: Mapping[str, int], name: str) -> int | None:
        """The value a field has under an assignment."""
        return fields[name] if name in fields else value_of(self.config, name)

    def known(self, fields: Mapping[str, int]) -> tuple[str, ...]:
        """Names of the fields that hold an integer under an assignment."""
        return tuple(dict.fromkeys((*self.reads.integers, *fields)))


def model_site(model: PreTrainedModel, layout: Layout) -> Site:
    """The model around its blocks, rebuilt with as few of them as its config allows."""
    start = copy_config(model.config)
    if layout.count_field is not None:
        keep_layers(part_of(start, layout.part), layout.count_field, layout.depth, range(1))
    if not _builds(model, start):
        start = copy_config(model.config)

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy_config(start)
        write_fields(part_of(config, layout.part), fields)
        return type(model)(config)

    def make_from(nested: PreTrainedConfig) -> nn.Module:
        if not layout.part:
            return type(model)(nested)
        config = copy_config(start)
        vars(config)[layout.part] = nested
        return type(model)(config)

    nested = part_of(start, layout.part)
    with on_meta():
        reads = record_reads(nested, make_from)
    return Site(make, nested, reads, tuple(stack.path for stack in layout.stacks))


def _builds(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    try:
        with on_meta():
            type(model)(copy_config(config))
    except Exception:
        return False
    return True


def block_site(
    model: PreTrainedModel, layout: Layout, index: int, block: nn.Module, own: Mapping[str, int]
) -> Site | None:
    """One block, rebuilt with the index it has in the dense model; None where its class cannot be called.

    Args:
        model: The dense model.
        layout: Where its blocks are.
        index: The block's place.
        block: The dense block.
        own: Fields in which the block already differs from the model's config.
    """
    builder = block_builder(block)
    if builder is None:
        return None
    start = copy_config(part_of(model.config, layout.part))
    write_fields(start, own)

    def make(fields: Mapping[str, int]) -> nn.Module:
        config = copy_config(start)
        write_fields(config, fields)
        return builder(config, index)

    with on_meta():
        reads = record_reads(start, lambda config: builder(config, index))
    return Site(make, start, reads)
