"""Places a model is rebuilt at: the whole model, and each of its blocks, on `meta` from a config."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import Reads, copy_config, keep_layers, part_of, record_reads, value_of, write_fields
from fxprune.emit.snapshot import Snapshot, take_snapshot

__all__ = ["Layout", "Site", "Stack", "block_builder", "block_site", "model_site", "on_meta", "survey"]

Builder = Callable[[PreTrainedConfig, int], nn.Module]


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules are built without storage, without gradients and without chatter about odd configs."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@dataclass(frozen=True)
class Stack:
    """A module list of blocks.

    Attributes:
        path: Module path of the list.
        blocks: The blocks of the dense model.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def paths(self) -> tuple[str, ...]:
        """Module paths of the blocks."""
        return tuple(f"{self.path}.{index}" for index in range(len(self.blocks)))


@dataclass(frozen=True)
class Layout:
    """Where blocks are in a model and which config they come from.

    Attributes:
        stacks: The outermost module lists, the longest first.
        part: Name of the nested config that describes the blocks; empty for the model's own.
        count_field: The field that sets the length of the longest stack; empty where lists with one entry a layer
            set it, None where nothing does.
    """

    stacks: tuple[Stack, ...]
    part: str
    count_field: str | None

    @property
    def depth(self) -> int:
        """Number of blocks in the longest stack."""
        return len(self.stacks[0].blocks) if self.stacks else 0

    def blocks(self) -> dict[str, tuple[int, nn.Module]]:
        """Index and module of every block by its module path."""
        return {
            path: (index, block)
            for stack in self.stacks
            for index, (path, block) in enumerate(zip(stack.paths(), stack.blocks, strict=True))
        }


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


def survey(model: PreTrainedModel) -> Layout:
    """Blocks, their config and the field that counts them are found."""
    stacks = tuple(sorted(_stacks(model), key=lambda stack: -len(stack.blocks)))
    if not stacks:
        return Layout((), "", None)
    part = _config_part(model, stacks[0].path)
    return Layout(stacks, part, _count_field(model, stacks[0], part))


def _stacks(model: nn.Module) -> Iterator[Stack]:
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{other}.") for other in outer):
            continue
        blocks = tuple(module)
        if blocks and all(next(block.parameters(), None) is not None for block in blocks):
            outer.append(path)
            yield Stack(path, blocks)


def _config_part(model: PreTrainedModel, path: str) -> str:
    owner = model.get_submodule(path.rpartition(".")[0])
    config = vars(owner).get("config")
    for name, value in vars(model.config).items():
        if value is config and isinstance(value, PreTrainedConfig):
            return name
    return ""


def _count_field(model: PreTrainedModel, stack: Stack, part: str) -> str | None:
    """The integer field, else the lists with one entry a layer (empty name), that set the number of blocks."""
    total = len(stack.blocks)
    fields = vars(part_of(model.config, part)).items()
    names = [name for name, value in fields if type(value) is int and value == total]
    for name, lists in [*((name, False) for name in names), ("", True), *((name, True) for name in names)]:
        config = copy_config(model.config)
        if lists:
            keep_layers(part_of(config, part), name, total, range(total - 1))
        else:
            write_fields(part_of(config, part), {name: total - 1})
        if total > 1 and _length(model, config, stack.path) == total - 1:
            return name
    return None


def _length(model: PreTrainedModel, config: PreTrainedConfig, path: str) -> int | None:
    try:
        with on_meta():
            blocks = type(model)(config).get_submodule(path)
    except Exception:
        return None
    return len(blocks) if isinstance(blocks, nn.ModuleList) else None


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


def block_builder(block: nn.Module) -> Builder | None:
    """How a block's class is called with a config and an index; None where its signature asks for more.

    Args:
        block: A block of the dense model.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(type(block)).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not parameters or any(p.default is p.empty for p in parameters[2:]):
        return None
    if len(parameters) > 1 and _takes_index(parameters[1]):
        return lambda config, index: type(block)(config, index)
    if len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty:
        return None
    return lambda config, index: type(block)(config)


def _takes_index(parameter: inspect.Parameter) -> bool:
    return parameter.name.endswith(("idx", "index", "id", "number", "num"))


def block_site(
    model: PreTrainedModel, layout: Layout, index: int, block: nn.Module, own: Mapping[str, int]
) -> Site | None:
    """One block, rebuilt with the index it has in the dense model; None where its class cannot be called.

    Args:
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
