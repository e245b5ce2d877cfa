"""From an ``ExportedProgram`` to a plain ``GraphModule`` bound to the real weights.

Without gradients, what is computed cannot be differentiated: where the rest of the graph reads it, it is detached.
Under autocast, ops take some of their inputs in another dtype: they get them cast.

A container is one input, and the tensors in it are read off it first thing. What is no tensor decided what was traced,
so the graph takes it, and refuses any other value; it may be left out if it was what the module takes it for then.

Parameters become ``get_attr`` nodes under their own names, asserts about metadata go, as nothing uses them, and devices
and the dtype of the model are read from the inputs and weights at run time, so that the module may move between both.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec

from fxprune.errors import TraceError
from fxprune.graph.compat import (
    AUTOCAST,
    GRADIENTS,
    FakeTensor,
    HigherOrderOperator,
    TorchDispatchMode,
    TreeSpec,
    has_unbacked_sizes,
    is_check,
    is_impure,
    is_size,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from fxprune.graph.tensors import base_name

__all__ = ["add_inputs", "called_with", "copy_body", "lower", "read_leaves"]

aten = torch.ops.aten
Env = dict[fx.Node, Any]
Autocast = tuple[str, torch.dtype]


def copy_body(source: fx.GraphModule, graph: fx.Graph, env: Env, device: str) -> list[Any]:
    """Copy the operations of a program into ``graph``; return what it returns, in terms of the new nodes.

    Args:
        source: the graph module of an exported program.
        graph: where to.
        env: the new node for each placeholder of ``source``; filled with the other nodes.
        device: the type of the device that the model runs on.
    """
    copier = _Copier(graph, device)
    copier.copy(source, env)
    return [copier.read(env[value], True) if isinstance(value, fx.Node) else value for value in _results(source)]


class _Copier:
    """Copies regions inside regions; knows which values have no gradient."""

    def __init__(self, graph: fx.Graph, device: str) -> None:
        self.graph = graph
        self.device = device
        self.stopped: dict[fx.Node, fx.Node | None] = {}
        self.sizes: dict[object, fx.Node] = {}

    def copy(self, source: fx.GraphModule, env: Env, grad: bool = True, autocast: Autocast | None = None) -> None:
        """Copy the body of ``source``, which runs with or without gradients, under autocast or not."""
        for node in source.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or is_check(node):
                continue
            if isinstance(node.target, HigherOrderOperator) and node.target.name() in (GRADIENTS, AUTOCAST):
                env[node] = self._region(node, source, env, grad, autocast)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple | list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                known = self.sizes.get(_size_of(node))
                casts = {} if autocast is None or known is not None else _casts(node, *autocast)
                env[node] = new = known or self._node(node, env, grad, casts)
                self.sizes.setdefault(_size_of(node), new)

    def read(self, value: Any, grad: bool) -> Any:
        """Return ``value`` as it is seen where there are gradients or not."""
        if not grad or not isinstance(value, fx.Node) or value not in self.stopped:
            return value
        found = self.stopped[value]
        if found is None:
            with self.graph.inserting_after(value):
                found = self.graph.call_function(aten.detach.default, (value,))
            found.meta = dict(value.meta)
            self.stopped[value] = found
        return found

    def _node(self, node: fx.Node, env: Env, grad: bool, casts: Mapping[fx.Node, torch.dtype]) -> fx.Node:
        """Copy one op; those of its inputs that ``casts`` names are cast before it.

        Ops of a name are numbered anew: what torch worked out for nothing while it traced left gaps.
        """

        def argument(old: fx.Node) -> Any:
            value = self.read(env[old], grad)
            if old not in casts:
                return value
            cast = self.graph.call_function(aten.to.dtype, (value, casts[old]))
            cast.meta = {**old.meta, "val": old.meta["val"].to(casts[old])}
            return cast

        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=base_name(node), type_expr=node.type)
        new.meta = dict(node.meta)
        if not grad and isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point():
            self.stopped[new] = None
        return new

    def _region(self, region: fx.Node, source: fx.GraphModule, env: Env, grad: bool, autocast: Autocast | None) -> Any:
        """Copy what is in a region; return what it returned."""
        position = next(i for i, arg in enumerate(region.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        mode, inner = region.args[:position], getattr(source, str(region.args[position].target))  # type: ignore[union-attr]
        values = [env[value] if isinstance(value, fx.Node) else value for value in region.args[position + 1 :]]
        inputs = [node for node in inner.graph.nodes if node.op == "placeholder"]
        below: Env = dict(zip(inputs, values, strict=True))
        if isinstance(region.target, HigherOrderOperator) and region.target.name() == GRADIENTS:
            grad = bool(mode[0])
        elif mode[0] == self.device:
            autocast = (_TRACED_ON, mode[1]) if mode[2] else None  # type: ignore[assignment]
        self.copy(inner, below, grad, autocast)
        return fx.map_arg(_results(inner), lambda old: below[old])


_TRACED_ON = "cpu"
"""Where the tensors of a trace are, whatever the device of the model."""


def _size_of(node: fx.Node) -> object:
    """Return what ``node`` works out of sizes, of which the graph needs one node only; itself if that is no size."""
    if not is_size(node) or has_unbacked_sizes(node.meta["val"]):
        return node
    return type(node.meta["val"]), node.meta["val"].node.expr


def _results(source: fx.GraphModule) -> Any:
    return source.graph.output_node().args[0]


def _casts(node: fx.Node, device: str, dtype: torch.dtype) -> dict[fx.Node, torch.dtype]:
    """Return the dtype in which ``node`` takes those of its inputs that autocast casts: it is run without storage."""
    sources = {id(source.meta["val"]): source for source in node.all_input_nodes if "val" in source.meta}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    fake = next((leaf.fake_mode for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "fake_mode")), None)
    if fake is None or not callable(node.target):
        return {}
    with fake, torch.autocast(device, dtype, cache_enabled=False), _SeenCasts(sources) as seen:
        node.target(*args, **kwargs)
    found: dict[fx.Node, torch.dtype] = seen.casts
    return found


class _SeenCasts(TorchDispatchMode):
    """Notes which of some tensors are cast, and to what."""

    def __init__(self, sources: Mapping[int, fx.Node]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.casts: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._to_copy.default and id(args[0]) in self.sources and (kwargs or {}).get("dtype"):
            self.casts[self.sources[id(args[0])]] = kwargs["dtype"]
        return func(*args, **(kwargs or {}))


Specs = Sequence[tuple[fx.Node, InputSpec]]


def called_with(program: torch.export.ExportedProgram, specs: Specs) -> dict[str, Any]:
    """Return, for each keyword that a program was called with, its placeholder, or a container of placeholders."""
    nodes = [node for node, spec in specs if spec.kind == InputKind.USER_INPUT]
    assert program.call_spec.in_spec is not None
    _, keywords = tree_unflatten(nodes, program.call_spec.in_spec)
    return dict(keywords)


def add_inputs(
    graph: fx.Graph, called: Mapping[str, Any], forward: Callable[..., Any], taken: Container[str | None]
) -> dict[str, fx.Node]:
    """Make a placeholder for each keyword.

    Args:
        graph: where to, still empty.
        called: what :func:`called_with` found.
        forward: what was traced.
        taken: names that nodes of weights have; an input of such a name gets another as a node.
    """
    made: dict[str, fx.Node] = {}
    optional = _optional(called, forward)
    for name, value in called.items():
        default = (_example(value),) if name in optional else ()
        node = graph.create_node("placeholder", name, default, name=f"{name}_input" if name in taken else name)
        node.meta = dict(value.meta) if isinstance(value, fx.Node) else {}
        node.meta["val"] = tree_map(_example, value)
        made[name] = node
    return made


def read_leaves(graph: fx.Graph, called: Mapping[str, Any], made: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Read the tensors off the inputs, and check the rest; return the new node for each placeholder of the program."""
    env: dict[fx.Node, fx.Node] = {}
    for name, value in called.items():
        for path, leaf in _leaves(value, name):
            node = made[name]
            for key in path:
                inner = graph.create_node("call_function", operator.getitem, (node, key), name=f"{node.name}_{key}")
                inner.meta["val"] = node.meta["val"][key]
                node = inner
            env[leaf] = node
            if not isinstance(leaf.meta.get("val"), torch.Tensor):
                _check(graph, node, name + "".join(f"[{key!r}]" for key in path))
    return env


def _example(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _optional(called: Mapping[str, Any], forward: Callable[..., Any]) -> set[str]:
    """The inputs that may be left out: the last ones, as Python wants it, that were what they are if left out."""
    parameters = inspect.signature(forward).parameters
    found: set[str] = set()
    for name in reversed(list(called)):
        value, parameter = called[name], parameters.get(name)
        if parameter is None or not isinstance(value, fx.Node) or isinstance(_example(value), torch.Tensor):
            break
        if type(_example(value)) is not type(parameter.default) or _example(value) != parameter.default:
            break
        found.add(name)
    return found


def _leaves(value: Any, name: str, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
    """Yield where each placeholder stands in a container."""
    if isinstance(value, fx.Node):
        yield path, value
        return
    if not isinstance(value, list | tuple | dict):
        raise TraceError(
            f"input {name} is a {type(value).__name__}",
            where=name,
            remedy="Pass tensors, or lists, tuples and dicts of tensors",
        )
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, name, (*path, key))


def _check(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Let the graph refuse another value than the one it was traced with."""
    value = node.meta["val"]
    same = graph.call_function(operator.is_ if value is None else operator.eq, (node, value))
    said = f"this graph was traced with {name}={value!r} and takes no other value"
    graph.call_function(torch.ops.aten._assert_scalar.default, (same, said))


_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def lower(
    program: torch.export.ExportedProgram, model: nn.Module, dtype: torch.dtype | None, fixed: Container[str] = ()
) -> fx.GraphModule:
    """Return a program as a graph module that shares the tensors of ``model`` and is called as the model is.

    Args:
        program: what ``torch.export`` made.
        model: the module whose parameters and buffers the graph shall use.
        dtype: the dtype that stands for the dtype of the model in ``program``; None to leave dtypes literal.
        fixed: names of inputs that the graph shall not have.

    Raises:
        TraceError: the program takes or returns something that is not a tensor or a container of tensors.
    """
    graph = fx.Graph()
    nodes = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    specs = list(zip(nodes, program.graph_signature.input_specs, strict=True))
    called = {name: value for name, value in called_with(program, specs).items() if name not in fixed}
    made = add_inputs(graph, called, model.forward, {spec.target for _, spec in specs})
    env: dict[fx.Node, Any] = {}
    attributes = _lower_weights(program, model, specs, graph, env)
    env.update(read_leaves(graph, called, made))
    device = next(iter(attributes.values())).device.type if attributes else "cpu"
    results = copy_body(program.graph_module, graph, env, device)
    assert program.call_spec.out_spec is not None
    graph.output(_rebuild(program.call_spec.out_spec, results, graph))
    _make_portable(graph, attributes, dtype)
    graph.eliminate_dead_code(is_impure)
    _sink_weights(graph)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: value for name, value in attributes.items() if name in used}, graph)


def _lower_weights(
    program: torch.export.ExportedProgram, model: nn.Module, specs: Specs, graph: fx.Graph, env: dict[fx.Node, Any]
) -> dict[str, torch.Tensor]:
    """Make ``get_attr`` nodes of weights; return the weights by name.

    No other node has the name of a weight: those without a dot are made under their own names.
    """
    attributes: dict[str, torch.Tensor] = {}
    for node, spec in specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        if spec.kind not in _WEIGHTS or spec.target is None:
            raise TraceError(
                f"it takes the input {node.name}, a {spec.kind.name} and no tensor",
                where=f"forward of {type(model).__name__}",
                remedy="Keep what is no tensor out of its attributes and inputs",
            )
        name = spec.target
        attributes[name] = _real_tensor(program, model, spec)
        env[node] = new = graph.create_node("get_attr", name, name=node.name if "." in name else name)
        new.meta = dict(node.meta)
    return attributes


def _real_tensor(program: torch.export.ExportedProgram, model: nn.Module, spec: InputSpec) -> torch.Tensor:
    assert spec.target is not None
    owner, _, leaf = spec.target.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), leaf)
    except AttributeError:
        value = program.constants[spec.target]
    assert isinstance(value, torch.Tensor)
    if isinstance(value, FakeTensor):
        raise TraceError(
            f"what is computed from inputs becomes a constant, a tensor of shape {tuple(value.shape)}",
            where=f"forward of {type(model).__name__}",
            remedy="Tracing does not follow x.data; write x.detach()",
        )
    return value


def _rebuild(spec: TreeSpec, leaves: list[Any], graph: fx.Graph) -> Any:
    """Return the output structure: containers as they are, other registered types as a call with their fields."""
    if spec.is_leaf():
        return leaves.pop(0)
    children = [_rebuild(child, leaves, graph) for child in spec.children()]
    if spec.type in (tuple, list):
        return spec.type(children)
    if not isinstance(spec.context, list) or not all(isinstance(key, str) for key in spec.context):
        raise TraceError(
            f"{spec.type} has no named fields", where="what forward returns", remedy="Return tensors, tuples or dicts"
        )
    fields = dict(zip(spec.context, children, strict=True))
    return fields if spec.type is dict else graph.call_function(spec.type, (), fields)


def _make_portable(graph: fx.Graph, attributes: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Replace device literals, and ``dtype`` where it stands for the model's, by what is there at run time."""
    sources = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    tensors = [node for node in sources if isinstance(node.meta["val"], torch.Tensor)]
    body = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    if not tensors or body is None:
        return
    weights = [n for n in tensors if n.op == "get_attr" and n.meta["val"].dtype == dtype]
    with graph.inserting_before(body):
        device = graph.call_function(getattr, (tensors[0], "device"))
        own = graph.call_function(getattr, (weights[0], "dtype")) if dtype is not None and weights else None
    swap = _literal_swap(device, dtype, own)
    for node in graph.nodes:
        if node.op == "call_function" and node is not device and node is not own:
            node.args = fx.node.map_aggregate(node.args, swap)
            node.kwargs = fx.node.map_aggregate(node.kwargs, swap)


def _sink_weights(graph: fx.Graph) -> None:
    """Read each weight right before its first use: an interpreter that makes a masked copy then holds few at a time."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in [node for node in order if node.op == "get_attr" and node.users]:
        min(node.users, key=lambda user: order[user]).prepend(node)


def _literal_swap(device: fx.Node, dtype: torch.dtype | None, own: fx.Node | None) -> Callable[[Any], Any]:
    def swap(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        return own if own is not None and value == dtype and isinstance(value, torch.dtype) else value

    return swap
