"""Tensors, names, inputs and argument paths of an fx graph.

A path is ``("args", 1, 0)`` or ``("kwargs", "size", 0)``: which arguments, which of them, and where in it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves, tree_map

__all__ = [
    "as_parameter",
    "base_name",
    "comparable",
    "computed_tensors",
    "copy_tensor",
    "delete_tensor",
    "device_of",
    "example_of",
    "get_tensor",
    "input_tensors",
    "is_input",
    "maker_of",
    "name_of_nonfinite",
    "names_by_identity",
    "on_meta",
    "output_name",
    "read_argument",
    "require_weights",
    "set_argument",
    "set_tensor",
    "starred",
    "submodule",
    "tensor_name",
    "weights",
    "with_argument",
]

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


def is_input(node: fx.Node) -> bool:
    """Whether ``node`` is an input of its graph, or something read off one that is a container."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def input_tensors(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Yield the node of each tensor that is passed to a graph, and how Python code spells it: ``x``, ``xs[0]``."""
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "placeholder":
            names[node] = str(node.target)
        elif node.target is operator.getitem and source in names:
            names[node] = f"{names[source]}[{node.args[1]!r}]"
    yield from ((node, name) for node, name in names.items() if isinstance(node.meta.get("val"), torch.Tensor))


def example_of(value: Any, make: Any) -> Any:
    """Return an input like the one that was traced: ``make(tensor)`` for each tensor, the rest as it was."""
    return tree_map(lambda leaf: make(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


_ROOTS = {"args": 0, "kwargs": 1}

_PLAIN = frozenset((bool, int, float, str, type(None)))


def read_argument(node: fx.Node, path: tuple[Any, ...]) -> Any:
    """Return the value at ``path`` of ``node``; None where the argument was left to its default."""
    value: Any = (node.args, node.kwargs)[_ROOTS[path[0]]]
    for key in path[1:]:
        if isinstance(value, dict) and key not in value:
            return None
        value = value[key]
    return value


def with_argument(arguments: Any, path: tuple[Any, ...], value: Any) -> tuple[Any, Any]:
    """Return ``(args, kwargs)`` with ``value`` at ``path``."""
    args, kwargs = arguments
    if path[0] == "args":
        return _replaced(args, path[1:], value), kwargs
    return args, _replaced(kwargs, path[1:], value)


def set_argument(node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` at ``path`` of ``node``."""
    node.args, node.kwargs = with_argument((node.args, node.kwargs), path, value)


def _replaced(container: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    if isinstance(container, dict):
        return {**container, keys[0]: _replaced(container.get(keys[0]), keys[1:], value)}
    items = list(container)
    items[keys[0]] = _replaced(items[keys[0]], keys[1:], value)
    return tuple(items) if isinstance(container, tuple) else items


def comparable(value: Any) -> Any:
    """Return arguments as something that compares: nodes by name, containers by content, the rest by its text."""
    if type(value) in _PLAIN:  # most are: asking for the abstract classes below takes longer than all the rest
        return repr(value)
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, Mapping):
        return tuple((key, comparable(item)) for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return (type(value).__name__, *(comparable(item) for item in value))
    return repr(value)


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
