"""Tensors, names, inputs and argument paths of an fx graph.

A path is ``("args", 1, 0)`` or ``("kwargs", "size", 0)``: which arguments, which of them, and where in it.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxprune.errors import GraphInputError, PassError
from fxprune.graph.compat import FakeTensor, tree_leaves, tree_map

M = TypeVar("M", bound=nn.Module)

_SIGN = "#"
"""Separates the name of a node from the number of its output; no name of a node or weight contains it."""


def base_name(node: fx.Node) -> str:
    """The name of ``node`` without the number that its graph gave it."""
    return re.sub(r"_\d+$", "", node.name)


def tensor_name(node: fx.Node) -> str:
    """The name of the tensor that ``node`` reads or computes; for several the prefix of their names."""
    return str(node.target) if node.op == "get_attr" else node.name


def output_name(node: fx.Node | str, i: int) -> str:
    """The name of output ``i`` of a node that computes several tensors."""
    return f"{node if isinstance(node, str) else node.name}{_SIGN}{i}"


def producer_of(tensor: str) -> str:
    """The name of the node that computes ``tensor``; for a weight its own name."""
    return tensor.partition(_SIGN)[0]


def starred(name: str) -> str:
    """Return the name of a tensor, module or group with ``*`` for the numbers in its module path."""
    path, slash, kind = name.partition("/")
    return re.sub(r"(?<=\.)\d+(?=[.\[]|$)", "*", path) + slash + kind


def is_input(node: fx.Node) -> bool:
    """Whether ``node`` is an input of its graph, or an item of one that is a container."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def input_tensors(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Yield the node of each input tensor of a graph, and its Python expression: ``x``, ``xs[0]``."""
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "placeholder":
            names[node] = str(node.target)
        elif node.target is operator.getitem and source in names:
            names[node] = f"{names[source]}[{node.args[1]!r}]"
    yield from ((node, name) for node, name in names.items() if isinstance(node.meta.get("val"), torch.Tensor))


def upstream(ends: Iterable[fx.Node], known: Container[fx.Node] = ()) -> Iterator[fx.Node]:
    """Yield ``ends`` and the nodes they are computed from; what ``known`` ones are computed from is left out."""
    found, pending = set[fx.Node](), list(ends)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += () if node in known else node.all_input_nodes
            yield node


TRACED = "this graph was traced "
"""Beginning of the message of a check of inputs."""


class CheckedGraph(fx.GraphModule):
    """A graph module whose checks of inputs raise :class:`GraphInputError`, with the sizes given.

    Its code may be there only once it is read or run, as :func:`~fxprune.graph.context.recompile_lazily` leaves it.
    """

    @property
    def code(self) -> str:
        """The code of ``forward``."""
        _ = self.forward  # which makes it, if it is not there yet
        return super().code

    def __str__(self) -> str:
        _ = self.forward
        return super().__str__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            limit = str(error)
            if not limit.startswith(TRACED):
                raise
        given = inspect.signature(self.forward).bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        sizes = [f"{name} is {tuple(value.shape)}" for name, value in tensors.items() if f"{name}.shape" in limit]
        remedy = "Pass an input like that, or trace the model with example_inputs like this one"
        raise GraphInputError(", ".join((limit, *sizes)), where="inputs", remedy=remedy)


def map_tensors(value: Any, make: Any) -> Any:
    """Return ``value`` with ``make(tensor)`` for each tensor in it."""
    return tree_map(lambda leaf: make(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors in the output of a module, in order.

    That of an output class, also within another, is the order of its fields: a model may set one after others that
    come later.
    """
    if isinstance(output, Mapping):
        names = dict.fromkeys((*getattr(output, "__dataclass_fields__", ()), *output))
        output = [output[name] for name in names if name in output]
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_of(item)]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def has_values(tensor: torch.Tensor, values: Any) -> bool:
    """Whether a tensor has ``values``, a nested list; one without storage counts as having them."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or bool(tensor.tolist() == values)


_PLAIN = frozenset((bool, int, float, str, type(None)))


def read_argument(node: fx.Node, path: tuple[Any, ...]) -> Any:
    """Return the value at ``path`` of ``node``; None if the argument has its default."""
    value: Any = {"args": node.args, "kwargs": node.kwargs}
    for key in path:
        if isinstance(value, dict) and key not in value:
            return None
        value = value[key]
    return value


def with_argument(arguments: Any, path: tuple[Any, ...], value: Any) -> tuple[Any, Any]:
    """Return ``(args, kwargs)`` with ``value`` at ``path``."""
    found = _replaced(dict(zip(("args", "kwargs"), arguments, strict=True)), path, value)
    return found["args"], found["kwargs"]


def set_argument(node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
    """Set the argument at ``path`` of ``node``."""
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
    """Return arguments in a comparable form: nodes by name, containers by content, the rest by ``repr``."""
    if type(value) in _PLAIN:  # the common case; the checks of abstract classes below are slow
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
    """``module.get_submodule(path)``, in a fraction of the time if no ``__getattr__`` is involved."""
    inner = module
    for part in path.split(".") if path else ():
        child = inner._modules.get(part)
        if child is None:
            return module.get_submodule(path)
        inner = child
    return inner


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer ``name`` of ``module``."""
    owner_path, _, leaf = name.rpartition(".")
    owner = submodule(module, owner_path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = value  # type: ignore[assignment]
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, value)


def as_parameter(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` as a parameter if ``like`` is one, with the same ``requires_grad``; else as it is."""
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value


def take(value: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """The entries along an axis at ``index (kept,)``, or in each row of the first axis at ``(rows, kept)``."""
    if index.dim() == 1:
        return value.index_select(axis, index)
    return torch.stack([row.index_select(axis - 1, own) for row, own in zip(value, index, strict=True)])


def put(value: torch.Tensor, axis: int, index: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """A copy of ``value`` with other entries where :func:`take` takes them."""
    if index.dim() == 1:
        return value.index_copy(axis, index, entries)
    rows = zip(value, index, entries, strict=True)
    return torch.stack([row.index_copy(axis - 1, own, new) for row, own, new in rows])


def masked(value: torch.Tensor, axis: int, mask: torch.Tensor) -> torch.Tensor:
    """``value`` with zeros along an axis where ``mask (size,)`` is false, or in each row where ``(rows, size)`` is."""
    shape = [1] * value.dim()
    shape[axis] = mask.shape[-1]
    if mask.dim() == 2:
        shape[0] = len(mask)
    return value * mask.to(value.device, value.dtype).view(shape)


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached copy of a tensor; for a parameter, a parameter."""
    return as_parameter(tensor.detach().clone(), tensor)


_LEAVES = (bool, int, float, str, torch.dtype, torch.device, nn.Module)
"""Types of most attributes of modules, which hold no tensors of their own."""

_CONTAINERS = (dict, OrderedDict, list, tuple, set)


def computed_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield tensors with a gradient history among a module's attributes: torch refuses to copy them.

    Weights computed by a hook (weight norm, parametrisations) are such tensors, and activations that a model keeps.
    """
    for part in module.modules():
        for name, value in vars(part).items():
            empty = value is None or (type(value) in _CONTAINERS and not value)  # as most tables of hooks are
            if name not in ("_parameters", "_modules") and not (empty or isinstance(value, _LEAVES)):
                leaves = tree_leaves(value)
                yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None)


def copy_with_hooks(model: M, memo: Mapping[int, Any]) -> M:
    """Return a deep copy of a model with the same hooks; ``memo`` has the copies of other objects, by their ``id``."""
    held = (item for module in model.modules() for item in vars(module).items())
    tables = (table for name, table in held if name.endswith("_hooks") and isinstance(table, Mapping))
    computed = {id(tensor): tensor.detach().clone() for tensor in computed_tensors(model)}
    return copy.deepcopy(model, {**memo, **computed, **{id(hook): hook for table in tables for hook in table.values()}})


def version_of(tensor: torch.Tensor) -> int:
    """The number of times a tensor was written to; 0 for one made in inference mode, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, then buffers, under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def names_by_identity(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return all names ``module`` has for each of its parameters and buffers, by ``id`` of the tensor."""
    found: dict[int, tuple[str, ...]] = {}
    for name, tensor in named_tensors(module):
        found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


def returned_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of the tensors that a graph returns, also inside containers."""
    found = set[fx.Node]()
    left = [graph.output_node()]
    while left:
        for source in left.pop().all_input_nodes:
            (found.add if isinstance(source.meta.get("val"), torch.Tensor) else left.append)(source)
    return found


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """The device of the tensors the graph reads; the CPU if it reads none."""
    return next((tensor.device for _, tensor in weights(graph_module)), torch.device("cpu"))


def weights(graph_module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor the graph reads, by name, in order of first appearance."""
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"):
        yield name, get_tensor(graph_module, name)


def weight_bytes(graph_module: fx.GraphModule) -> int:
    """Bytes of the tensors the graph reads."""
    return sum(tensor.nbytes for _, tensor in weights(graph_module))


def has_meta_weights(graph_module: fx.GraphModule) -> bool:
    """Whether the graph reads a tensor on ``meta``."""
    return any(tensor.is_meta for _, tensor in weights(graph_module))


def require_weights(graph_module: fx.GraphModule, name: str) -> None:
    """Refuse to run the pass ``name`` on a graph that reads a tensor on ``meta``."""
    if has_meta_weights(graph_module):
        raise PassError("the weights are on meta", where=f"pass {name}", remedy="Load the weights first")
