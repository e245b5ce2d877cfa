"""Names of tensors and modules, in the dense model and in the slim one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from fxprune.graph.blocks import within

__all__ = ["names_in", "slim_name"]

T = TypeVar("T")


def names_in(named: Mapping[str, T], path: str) -> dict[str, T]:
    """Return what lies below a module, by name within it."""
    prefix = f"{path}."
    return {name[len(prefix) :]: value for name, value in named.items() if name.startswith(prefix)}


def slim_name(name: str, removed_blocks: Collection[str]) -> str | None:
    """Return what a module or tensor of the dense model is called in the slim one; None if it is gone.

    Blocks after a removed one move up.

    Args:
        name: name in the dense model.
        removed_blocks: module paths of the blocks that are gone, such as ``"decoder.3"``.
    """
    if within(f"{name}.", removed_blocks):
        return None
    gone: dict[str, list[int]] = {}
    for path, _, index in (block.rpartition(".") for block in removed_blocks):
        if index.isdigit():
            gone.setdefault(path, []).append(int(index))
    for path, indices in gone.items():
        index, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if within(name, (path,)) and index.isdigit():
            return f"{path}.{int(index) - sum(other < int(index) for other in indices)}{dot}{rest}"
    return name
