"""Blocks taken out of a model: those behind move up, and keep what they are."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import keep_blocks, part_of
from fxprune.emit.layout import Layout, Stack
from fxprune.emit.meta import build_on_meta
from fxprune.emit.snapshot import Number, take_snapshot
from fxprune.graph.attempts import Refusal
from fxprune.modelling.blocks import BUILT_AT, builder_of, names_index, renumber

__all__ = ["remove_blocks"]


def remove_blocks(model: PreTrainedModel, removed: Collection[str], layout: Layout) -> None:
    """Take blocks out of a model and tell its config; the others get their new index.

    Args:
        model: the slim model, with as many blocks as the dense one; changed in place.
        removed: module paths of the blocks that go.
        layout: where blocks are.
    """
    for stack in layout.stacks:
        kept = [index for index, path in enumerate(stack.paths()) if path not in removed]
        if len(kept) < len(stack.blocks):
            _shorten(model, layout, stack, kept)


def _shorten(model: PreTrainedModel, layout: Layout, stack: Stack, kept: Sequence[int]) -> None:
    """Shorten one list of blocks. The config counts those of the first alone."""
    counted = stack is layout.stacks[0]
    blocks, whole = model.get_submodule(stack.path), part_of(model.config, layout.part)
    shorter = copy.deepcopy(whole)
    if counted:
        keep_blocks(shorter, layout.count_field, layout.depth, kept)
    for new, old in enumerate(kept):
        move = _Move(whole, shorter, old, new)
        move.renumber(blocks.get_submodule(str(old)))
        if counted:
            move.mark(blocks.get_submodule(str(old)))
    for config in _configs(model, layout) if counted else ():
        keep_blocks(config, layout.count_field, layout.depth, kept)
    for old in reversed(range(len(stack.blocks))):
        if old not in kept and isinstance(blocks, nn.ModuleList):
            del blocks[old]


def _configs(model: PreTrainedModel, layout: Layout) -> list[PreTrainedConfig]:
    """Return the config that the blocks are built from, and those that they hold."""
    whole = part_of(model.config, layout.part)
    held = [vars(m).get("config") for path in layout.blocks() for m in model.get_submodule(path).modules()]
    return list({id(config): config for config in (whole, *held) if isinstance(config, PreTrainedConfig)}.values())


@dataclass(frozen=True)
class _Move:
    """A block that moves up: built where it was and where it goes, what differs with the place is its index.

    Args:
        whole: config of all blocks.
        shorter: config of the kept blocks.
        old: index before.
        new: index after.
    """

    whole: PreTrainedConfig
    shorter: PreTrainedConfig
    old: int
    new: int

    def renumber(self, block: nn.Module) -> None:
        """Give attributes that hold the block's index the new one."""
        if self.old == self.new:
            return
        before, after = _numbers(block, self.whole, self.old), _numbers(block, self.shorter, self.new)

        def follows(path: str, name: str) -> bool:
            key = (path, name)
            if key in before and key in after:
                return (before[key], after[key]) == (self.old, self.new)
            return names_index(name)

        renumber(block, self.old, self.new, follows)

    def mark(self, block: nn.Module) -> None:
        """Note on a block of a kind that its class does not build at its new index where it was built."""
        if BUILT_AT in vars(block):
            return
        here, there = _built(block, self.whole, self.old), _built(block, self.shorter, self.new)
        if here is None or there is None or _kinds(here) == _kinds(there):
            return
        plain = {name: value for name, value in vars(self.whole).items() if type(value) in (int, list, tuple)}
        fields = {name: value for name, value in plain.items() if vars(self.shorter)[name] != value}
        vars(block)[BUILT_AT] = {"index": self.old, "fields": fields}


def _kinds(block: nn.Module) -> dict[str, type]:
    tensors = {name: type(p) for name, p in block.named_parameters(remove_duplicate=False)}
    return {**{path: type(module) for path, module in block.named_modules()}, **tensors}


def _built(block: nn.Module, config: PreTrainedConfig, index: int) -> nn.Module | None:
    """Return a block like this one, built on ``meta``; None where its class refuses."""
    builder = builder_of(block)
    built = None if builder is None else build_on_meta(builder, copy.deepcopy(config), index)
    return None if isinstance(built, Refusal) else built


def _numbers(block: nn.Module, config: PreTrainedConfig, index: int) -> Mapping[tuple[str, str], Number]:
    built = _built(block, config, index)
    return {} if built is None else take_snapshot(built).numbers
