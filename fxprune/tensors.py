"""Parameters and buffers by their dotted name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

__all__ = ["delete_tensor", "device_of", "get_tensor", "names_by_identity", "set_tensor", "weights"]


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


def names_by_identity(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names ``module`` has for each of its parameters and buffers, by ``id`` of the tensor."""
    found: dict[int, tuple[str, ...]] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """The device of the tensors the graph reads; the CPU where it reads none."""
    return next((tensor.device for _, tensor in weights(graph_module)), torch.device("cpu"))


def weights(graph_module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor the graph reads, by name, in order of first appearance."""
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"):
        yield name, get_tensor(graph_module, name)
