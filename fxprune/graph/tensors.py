"""Parameters and buffers by their dotted name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves

__all__ = [
    "as_parameter",
    "computed_tensors",
    "copy_tensor",
    "delete_tensor",
    "device_of",
    "get_tensor",
    "name_of_nonfinite",
    "names_by_identity",
    "on_meta",
    "require_weights",
    "set_tensor",
    "submodule",
    "weights",
]


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer ``name`` of ``module``."""
    owner, _, leaf = name.rpartition(".")
    inner = submodule(module, owner)
    value = inner._parameters.get(leaf)
    if value is None:
        value = getattr(inner, leaf)
    assert isinstance(value, torch.Tensor), f"{name} is not a tensor"
    return value


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Return what ``get_submodule`` does; where modules lie plainly inside each other, in a fraction of the time."""
    inner = module
    for part in path.split(".") if path else ():
        child = inner._modules.get(part)
        if child is None:
            return module.get_submodule(path)
        inner = child
    return inner


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer ``name`` of ``module``."""
    owner_path, _, leaf = name.rpartition(".")
    owner = submodule(module, owner_path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = value  # type: ignore[assignment]
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, value)


def as_parameter(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` as a parameter where ``like`` is one, trained where that is; else as it is."""
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with memory of its own and the same values; of a parameter, a parameter."""
    return as_parameter(tensor.detach().clone(), tensor)


def computed_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what ``module`` computed with gradients and keeps among its attributes: torch refuses to copy that.

    Weights made of others by a hook are such tensors, and so are activations that code of a model keeps to show.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_modules"):
                leaves = tree_leaves(value)
                yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None)


def delete_tensor(module: nn.Module, name: str) -> None:
    """Take the parameter or buffer ``name`` out of ``module``."""
    owner, _, leaf = name.rpartition(".")
    delattr(submodule(module, owner), leaf)


def names_by_identity(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return all names ``module`` has for each of its parameters and buffers, by ``id`` of the tensor."""
    found: dict[int, tuple[str, ...]] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """The device of the tensors the graph reads; the CPU where it reads none."""
    return next((tensor.device for _, tensor in weights(graph_module)), torch.device("cpu"))


def weights(graph_module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor the graph reads, by name, in order of first appearance."""
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"):
        yield name, get_tensor(graph_module, name)


def on_meta(graph_module: fx.GraphModule) -> bool:
    """Whether the graph reads a tensor that has no values."""
    return any(tensor.is_meta for _, tensor in weights(graph_module))


def name_of_nonfinite(graph_module: fx.GraphModule) -> str:
    """The name of the first parameter the graph reads that holds NaN or an infinity; empty where none does."""
    trained = ((name, t) for name, t in weights(graph_module) if isinstance(t, nn.Parameter) and not t.is_meta)
    return next((name for name, tensor in trained if not bool(tensor.isfinite().all())), "")


def require_weights(graph_module: fx.GraphModule, name: str) -> None:
    """Refuse to run a pass on weights that have no values.

    Args:
        graph_module: the graph.
        name: the pass, for the message.

    Raises:
        PassError: the graph reads a tensor on ``meta``.
    """
    if on_meta(graph_module):
        raise PassError("the weights are on meta", where=f"pass {name}", remedy="Load the weights first")
