"""The repeated blocks of a model, found by their form: a list of equal modules that have parts of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fxprune.graph.facts import Fact

__all__ = ["Blocks", "find_blocks", "owner_block", "within"]


@dataclass(frozen=True)
class Blocks(Fact):
    """The repeated blocks of the model.

    Args:
        paths: their module paths, in order of definition.
    """

    paths: tuple[str, ...] = ()


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the module paths of the outermost repeated blocks, in order of definition.

    A block is a child of a ``ModuleList`` or ``Sequential`` all of whose children are of one class and have
    children with parameters themselves: a list of plain linears is not a list of blocks. A ``ModuleList`` may hold
    blocks of a few classes that repeat, as those with and without attention do.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        inside = path in found or within(path, found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside and _are_blocks(module):
            found.extend(f"{path}.{name}" if path else name for name, _ in module.named_children())
    return tuple(found)


def owner_block(name: str, blocks: tuple[str, ...]) -> str | None:
    """Return the block that ``name`` (a module path or tensor name) is or lies in; None if it is in none."""
    around = {name, *_around(name)}
    return next((block for block in blocks if block in around), None)


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether ``name`` (a module path or tensor name) lies below one of the modules at ``paths``."""
    return not _around(name).isdisjoint(paths)


def _around(name: str) -> set[str]:
    """Return the paths of all modules that ``name`` lies below."""
    found, end = set[str](), name.find(".")
    while end >= 0:
        found.add(name[:end])
        end = name.find(".", end + 1)
    return found


def _are_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    children = list(module)
    classes = len({type(child) for child in children})
    if classes != 1 and not (isinstance(module, nn.ModuleList) and 0 < classes < len(children)):
        return False
    return all(any(True for part in child.children() for _ in part.parameters()) for child in children)
