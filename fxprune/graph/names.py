"""What tensors are called: a weight by its own name, all else by the node that makes it."""

from __future__ import annotations

import re

from torch import fx

__all__ = ["base_name", "maker_of", "output_name", "starred", "tensor_name"]

_SIGN = "#"
"""Between the name of a node and the number of its output; no name of a node or weight has it."""


def base_name(node: fx.Node) -> str:
    """The name of ``node`` without the number that its graph gave it."""
    return re.sub(r"_\d+$", "", node.name)


def tensor_name(node: fx.Node) -> str:
    """The name of the tensor that ``node`` reads or makes; of several, what all their names start with."""
    return str(node.target) if node.op == "get_attr" else node.name


def output_name(node: fx.Node | str, i: int) -> str:
    """The name of output ``i`` of a node that makes several tensors."""
    return f"{node if isinstance(node, str) else node.name}{_SIGN}{i}"


def maker_of(tensor: str) -> str:
    """The name of the node that makes ``tensor``; that of the tensor itself for a weight."""
    return tensor.partition(_SIGN)[0]


def starred(name: str) -> str:
    """Return ``name``, of a tensor, a module or a group, with ``*`` for the numbers in its module path."""
    path, slash, kind = name.partition("/")
    return re.sub(r"(?<=\.)\d+(?=[.\[]|$)", "*", path) + slash + kind
