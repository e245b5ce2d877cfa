"""Where the blocks of a model are, which config they come from and what counts them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import keep_blocks, part_of
from fxprune.emit.meta import build_on_meta
from fxprune.graph.blocks import within
from fxprune.modelling.block_config import put_fields

__all__ = ["Layout", "Stack", "survey"]


@dataclass(frozen=True)
class Stack:
    """A module list of blocks.

    Args:
        path: module path of the list.
        blocks: the blocks of the dense model.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def paths(self) -> tuple[str, ...]:
        """Return the module paths of the blocks."""
        return tuple(f"{self.path}.{index}" for index in range(len(self.blocks)))


@dataclass(frozen=True)
class Layout:
    """Where blocks are in a model and which config they come from.

    Args:
        stacks: the outermost module lists, those of the text decoder first where there are others, the longest first.
        part: name of the nested config that describes the blocks; empty for the model's own.
        count_field: the field that sets the length of the first stack; empty where lists with one entry a block set
            it, None where nothing does.
    """

    stacks: tuple[Stack, ...]
    part: str
    count_field: str | None

    @property
    def depth(self) -> int:
        """Number of blocks in the first stack."""
        return len(self.stacks[0].blocks) if self.stacks else 0

    def blocks(self) -> dict[str, tuple[int, nn.Module]]:
        """Return index and module of every block by its module path."""
        return {
            path: (index, block)
            for stack in self.stacks
            for index, (path, block) in enumerate(zip(stack.paths(), stack.blocks, strict=True))
        }


def survey(model: PreTrainedModel) -> Layout:
    """Return where the blocks of a model are, with their config and the field that counts them."""
    text = model.config.get_text_config(decoder=True)
    stacks = tuple(sorted(_stacks(model), key=lambda s: (_config_of(model, s.path) is not text, -len(s.blocks))))
    if not stacks:
        return Layout((), "", None)
    part = _config_part(model, stacks[0].path)
    return Layout(stacks, part, _count_field(model, stacks[0], part))


def _stacks(model: nn.Module) -> Iterator[Stack]:
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or within(path, outer):
            continue
        blocks = tuple(module)
        if blocks and all(next(block.parameters(), None) is not None for block in blocks):
            outer.append(path)
            yield Stack(path, blocks)


def _config_part(model: PreTrainedModel, path: str) -> str:
    config = _config_of(model, path)
    for name, value in vars(model.config).items():
        if value is config and isinstance(value, PreTrainedConfig):
            return name
    return ""


def _config_of(model: PreTrainedModel, path: str) -> object:
    """Return the config that the owner of the module list at ``path`` holds."""
    return vars(model.get_submodule(path.rpartition(".")[0])).get("config")


def _count_field(model: PreTrainedModel, stack: Stack, part: str) -> str | None:
    """Return the integer field, else the lists with one entry a block (empty name), that set how many there are."""
    total = len(stack.blocks)
    fields = vars(part_of(model.config, part)).items()
    names = [name for name, value in fields if type(value) is int and value == total]
    for name, lists in [*((name, False) for name in names), ("", True), *((name, True) for name in names)]:
        config = copy.deepcopy(model.config)
        if lists:
            keep_blocks(part_of(config, part), name, total, range(total - 1))
        else:
            put_fields(part_of(config, part), {name: total - 1})
        if total > 1 and _length(model, config, stack.path) == total - 1:
            return name
    return None


def _length(model: PreTrainedModel, config: PreTrainedConfig, path: str) -> int | None:
    """Return how many blocks a config gives a model; None where its class refuses it or has no such list."""
    built = build_on_meta(type(model), config)
    blocks = dict(built.named_modules()).get(path) if isinstance(built, nn.Module) else None
    return len(blocks) if isinstance(blocks, nn.ModuleList) else None
