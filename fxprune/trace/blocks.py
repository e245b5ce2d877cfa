"""The repeated blocks of a model, found by their form: a list of equal modules that have parts of their own."""

from __future__ import annotations

from torch import nn

__all__ = ["find_blocks", "owner_block"]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the outermost repeated blocks, in order of definition.

    A block is a child of a ``ModuleList`` or ``Sequential`` all of whose children are of one class and have
    children with parameters themselves: a list of plain linears is not a list of blocks. A ``ModuleList`` may hold
    blocks of a few classes that repeat, as layers with and without attention do.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path == block or path.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside and _are_blocks(module):
            found.extend(f"{path}.{name}" if path else name for name, _ in module.named_children())
    return tuple(found)


def owner_block(name: str, blocks: tuple[str, ...]) -> str | None:
    """The block that ``name`` (a module path or parameter name) is in."""
    for length in range(name.count(".") + 1, 0, -1):
        prefix = ".".join(name.split(".")[:length])
        if prefix in blocks:
            return prefix
    return None


def _are_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    children = list(module)
    classes = len({type(child) for child in children})
    if classes != 1 and not (isinstance(module, nn.ModuleList) and 0 < classes < len(children)):
        return False
    return all(any(True for part in child.children() for _ in part.parameters()) for child in children)
