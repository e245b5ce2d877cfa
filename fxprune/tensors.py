"""Parameters and buffers by their dotted name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

__all__ = ["delete_tensor", "get_tensor", "set_tensor", "weights"]


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer ``name`` of ``module``."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, torch.Tensor), f"{name} is not a tensor"
    return value


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer ``name`` of ``module``."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = value  # type: ignore[assignment]
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, value)


def delete_tensor(module: nn.Module, name: str) -> None:
    """Take the parameter or buffer ``name`` out of ``module``."""
    owner, _, leaf = name.rpartition(".")
    delattr(module.get_submodule(owner), leaf)


def weights(graph_module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor the graph reads, by name, in order of first appearance."""
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"):
        yield name, get_tensor(graph_module, name)
