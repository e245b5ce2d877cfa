"""Lowering of an ``ExportedProgram`` to a plain ``GraphModule`` bound to the real weights.

Values computed without gradients are detached where the rest of the graph reads them; autocast becomes explicit casts.
A container is one input of the graph, and its tensors are read from it first. A value that is not a tensor may have
decided what was traced, so the graph takes it and refuses any other value; it is optional if it equals its default.
Devices and the dtype of the model are read from inputs and weights at run time: the graph can be moved and cast.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType
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
from fxprune.graph.tensors import TRACED, CheckedGraph, base_name, has_values
from fxprune.trace.inputs import forward_parameters

PLAIN_OPS = (
    "Write torch.cond, torch.while_loop, torch.func.vmap and the like without these functions, and flex_attention as "
    "torch.nn.functional.scaled_dot_product_attention with a mask"
)
"""Remedy for a call with functions among its arguments."""

aten = torch.ops.aten
Env = dict[fx.Node, Any]
Autocast = tuple[str, torch.dtype]


class _Copier:
    """Copies a program with its nested regions.

    ``no_grad`` holds the nodes computed without gradients, each with its detached copy once that is needed; ``sizes``
    the first node of each size expression.
    """

    def __init__(self, graph: fx.Graph, device: str) -> None:
        self.graph = graph
        self.device = device
        self.no_grad: dict[fx.Node, fx.Node | None] = {}
        self.sizes: dict[object, fx.Node] = {}

    def copy(self, source: fx.GraphModule, env: Env, grad: bool = True, autocast: Autocast | None = None) -> None:
        """Copy the body of ``source``, which runs with gradients if ``grad``, under ``autocast`` if given."""
        for node in source.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or is_check(node):
                continue
            if isinstance(node.target, HigherOrderOperator) and node.target.name() in (GRADIENTS, AUTOCAST):
                env[node] = self._region(node, source, env, grad, autocast)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple | list):
                env[node] = env[node.args[0]][node.args[1]]
            elif held := _holds_code(node):
                raise TraceError(
                    f"{held} runs functions of its own, which are not part of one graph",
                    where=node.name,
                    remedy=PLAIN_OPS,
                )
            else:
                key: object = node
                if is_size(node) and not has_unbacked_sizes(node.meta["val"]):
                    key = type(node.meta["val"]), node.meta["val"].node.expr  # one node for each size is enough
                known = self.sizes.get(key)
                casts = {} if autocast is None or known is not None else _autocast_casts(node, *autocast)
                env[node] = new = known or self._copy_node(node, env, grad, casts)
                self.sizes.setdefault(key, new)

    def read(self, value: Any, grad: bool) -> Any:
        """``value`` as read in a region with or without gradients: with gradients, values without are detached."""
        if not grad or not isinstance(value, fx.Node) or value not in self.no_grad:
            return value
        found = self.no_grad[value]
        if found is None:
            with self.graph.inserting_after(value):
                found = self.graph.call_function(aten.detach.default, (value,))
            found.meta = dict(value.meta)
            self.no_grad[value] = found
        return found

    def _copy_node(self, node: fx.Node, env: Env, grad: bool, casts: Mapping[fx.Node, torch.dtype]) -> fx.Node:
        """Copy one op, with casts of its inputs in ``casts``.

        Names are numbered again, since ops that torch traced and dropped left gaps.
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
            self.no_grad[new] = None
        return new

    def _region(self, region: fx.Node, source: fx.GraphModule, env: Env, grad: bool, autocast: Autocast | None) -> Any:
        """Copy the body of a region; return its results."""
        position = next(i for i, arg in enumerate(region.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        mode, inner = region.args[:position], getattr(source, str(region.args[position].target))  # type: ignore[union-attr]
        values = [env[value] if isinstance(value, fx.Node) else value for value in region.args[position + 1 :]]
        inputs = [node for node in inner.graph.nodes if node.op == "placeholder"]
        below: Env = dict(zip(inputs, values, strict=True))
        if isinstance(region.target, HigherOrderOperator) and region.target.name() == GRADIENTS:
            grad = bool(mode[0])
        elif mode[0] == self.device:
            # the tensors in a trace are on the CPU, whatever the device of the model
            autocast = ("cpu", mode[1]) if mode[2] else None  # type: ignore[assignment]
        self.copy(inner, below, grad, autocast)
        return fx.map_arg(inner.graph.output_node().args[0], lambda old: below[old])


def _holds_code(node: fx.Node) -> str:
    """The name of a call that runs other graphs, or opens a level of ``torch.func``, in which ops have another axis."""
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return "torch.func"
    inner = (getattr(node.graph.owning_module, str(arg.target), None) for arg in node.all_input_nodes)
    return base_name(node) if any(isinstance(module, fx.GraphModule) for module in inner) else ""


def _autocast_casts(node: fx.Node, device: str, dtype: torch.dtype) -> dict[fx.Node, torch.dtype]:
    """The inputs of ``node`` that autocast casts, with their new dtype, found by running it on fake tensors."""
    sources = {id(source.meta["val"]): source for source in node.all_input_nodes if "val" in source.meta}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    fake = next((leaf.fake_mode for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "fake_mode")), None)
    if fake is None or not callable(node.target):
        return {}
    with fake, torch.autocast(device, dtype, cache_enabled=False), _CastRecorder(sources) as recorder:
        node.target(*args, **kwargs)
    found: dict[fx.Node, torch.dtype] = recorder.casts
    return found


class _CastRecorder(TorchDispatchMode):
    """Records the casts of some tensors, given by the ``id`` of each."""

    def __init__(self, sources: Mapping[int, fx.Node]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.casts: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._to_copy.default and id(args[0]) in self.sources and (kwargs or {}).get("dtype"):
            self.casts[self.sources[id(args[0])]] = kwargs["dtype"]
        return func(*args, **(kwargs or {}))


def _add_inputs(
    graph: fx.Graph, called: Mapping[str, Any], model: nn.Module, taken: Container[str | None]
) -> dict[str, fx.Node]:
    """Add a placeholder for each keyword to an empty graph, of another name if that is ``taken`` by a weight.

    ``called`` has the old placeholder, or container of placeholders, of each keyword of ``forward``.
    """
    optional, parameters = set[str](), forward_parameters(model)
    for name in reversed(list(called)):  # trailing inputs whose values are the defaults, which callers may omit
        value, parameter = _example(called[name]), parameters.get(name)
        if parameter is None or not isinstance(called[name], fx.Node) or isinstance(value, torch.Tensor):
            break
        if type(value) is not type(parameter.default) or value != parameter.default:
            break
        optional.add(name)
    made: dict[str, fx.Node] = {}
    for name, value in called.items():
        default = (_example(value),) if name in optional else ()
        node = graph.create_node("placeholder", name, default, name=f"{name}_input" if name in taken else name)
        node.meta = dict(value.meta) if isinstance(value, fx.Node) else {}
        node.meta["val"] = tree_map(_example, value)
        made[name] = node
    return made


def _read_leaves(graph: fx.Graph, called: Mapping[str, Any], made: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Read the tensors in each input, and check other values; return the new node for each old placeholder."""
    env: dict[fx.Node, fx.Node] = {}
    for name, value in called.items():
        for path, leaf in _leaves(value, name):
            node = made[name]
            for key in path:
                inner = graph.create_node("call_function", operator.getitem, (node, key), name=f"{node.name}_{key}")
                inner.meta["val"] = node.meta["val"][key]
                node = inner
            env[leaf] = node
            value = node.meta["val"]
            if not isinstance(leaf.meta.get("val"), torch.Tensor):
                same = graph.call_function(operator.is_ if value is None else operator.eq, (node, value))
                label = name + "".join(f"[{key!r}]" for key in path)
                message = f"{TRACED}with {label}={value!r} and takes no other value"
                graph.call_function(aten._assert_scalar.default, (same, message))
    return env


def _example(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _leaves(value: Any, name: str, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
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


_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def lower(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    dtype: torch.dtype | None,
    fixed: Container[str] = (),
    known: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> fx.GraphModule:
    """Lower a program to a graph module that shares the tensors of ``model`` and has the signature of its call.

    Args:
        dtype: the dtype in ``program`` that means the dtype of the model; None to keep dtypes literal.
        fixed: names of inputs that the graph must not have.
        known: values that inputs had in ``program``; the graph refuses others.

    Raises:
        TraceError: the program takes or returns something that is not a tensor or a container of tensors.
    """
    graph = fx.Graph()
    nodes = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    specs = list(zip(nodes, program.graph_signature.input_specs, strict=True))
    assert program.call_spec.in_spec is not None and program.call_spec.out_spec is not None
    given = [node for node, spec in specs if spec.kind == InputKind.USER_INPUT]
    _, keywords = tree_unflatten(given, program.call_spec.in_spec)
    called = {name: value for name, value in keywords.items() if name not in fixed}
    made = _add_inputs(graph, called, model, {spec.target for _, spec in specs})
    env: dict[fx.Node, Any] = {}
    attributes: dict[str, torch.Tensor] = {}
    for node, spec in specs:  # before all ops, so that none of them takes the name of a weight
        if spec.kind != InputKind.USER_INPUT:
            name = str(spec.target)
            attributes[name] = _real_tensor(program, model, node, spec)
            env[node] = graph.create_node("get_attr", name, name=node.name if "." in name else name)
            env[node].meta = dict(node.meta)
    env.update(_read_leaves(graph, called, made))
    for name, value in known.items():
        same = graph.call_function(has_values, (made[name], value.tolist()))
        message = f"{TRACED}with the values of {name} in its example and takes no others"
        graph.call_function(aten._assert_scalar.default, (same, message))
    device = next(iter(attributes.values())).device.type if attributes else "cpu"
    copier = _Copier(graph, device)
    copier.copy(program.graph_module, env)
    returned: Any = program.graph.output_node().args[0]
    results = [copier.read(env[value], True) if isinstance(value, fx.Node) else value for value in returned]
    graph.output(_rebuild(program.call_spec.out_spec, results, graph))
    _replace_literals(graph, attributes, dtype)
    graph.eliminate_dead_code(is_impure)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in [node for node in order if node.op == "get_attr" and node.users]:
        # read weights right before their first use: an interpreter that makes masked copies then holds few at a time
        min(node.users, key=lambda user: order[user]).prepend(node)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return CheckedGraph({name: value for name, value in attributes.items() if name in used}, graph)


def _real_tensor(
    program: torch.export.ExportedProgram, model: nn.Module, node: fx.Node, spec: InputSpec
) -> torch.Tensor:
    """The tensor of the model, or of the program alone, that a placeholder stands for."""
    where = f"forward of {type(model).__name__}"
    if spec.kind not in _WEIGHTS or spec.target is None:
        raise TraceError(
            f"it takes the input {node.name}, a {spec.kind.name} instead of a tensor",
            where=where,
            remedy="Remove objects other than tensors from its attributes and inputs",
        )
    owner, _, leaf = spec.target.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), leaf)
    except AttributeError:
        value = program.constants[spec.target]
    assert isinstance(value, torch.Tensor)
    if isinstance(value, FakeTensor):
        raise TraceError(
            f"a tensor of shape {tuple(value.shape)} that is computed from inputs becomes a constant",
            where=where,
            remedy="Write x.detach() instead of x.data, which tracing does not follow",
        )
    if spec.kind == InputKind.CONSTANT_TENSOR and not value.is_meta:
        own = (key for key, weight in model.named_parameters() if weight.data_ptr() == value.data_ptr())
        if (held := next(own, None)) is not None:
            raise TraceError(
                f"it reads {held} of the model itself, which a function such as a decorated forward holds",
                where=where,
                remedy="Decorate forward in the class, not on the instance",
            )
    return value


def _rebuild(spec: TreeSpec, leaves: list[Any], graph: fx.Graph) -> Any:
    """The output structure: containers as they are, other registered types as a call with their fields."""
    if spec.is_leaf():
        return leaves.pop(0)
    children = [_rebuild(child, leaves, graph) for child in spec.children()]
    if spec.type in (tuple, list):
        return spec.type(children)
    if not isinstance(spec.context, list) or not all(isinstance(key, str) for key in spec.context):
        raise TraceError(
            f"{spec.type} has no named fields", where="output of forward", remedy="Return tensors, tuples or dicts"
        )
    fields = dict(zip(spec.context, children, strict=True))
    return fields if spec.type is dict else graph.call_function(spec.type, (), fields)


def _replace_literals(graph: fx.Graph, attributes: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Replace device literals, and ``dtype`` if it means the model's, by reads of an input's and a weight's."""
    sources = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    tensors = [node for node in sources if isinstance(node.meta["val"], torch.Tensor)]
    body = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    if not tensors or body is None:
        return
    named = [node for node in tensors if node.op == "get_attr"]
    read = {id(attributes[str(node.target)]) for node in named if node.users}  # perhaps by another name
    # a weight that nothing reads must not stay for its dtype
    weights = [n for n in named if n.meta["val"].dtype == dtype and id(attributes[str(n.target)]) in read]
    with graph.inserting_before(body):
        device = graph.call_function(getattr, (tensors[0], "device"))
        dtypes = {dtype: graph.call_function(getattr, (weights[0], "dtype"))} if dtype is not None and weights else {}

    def swap(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        return dtypes.get(value, value) if isinstance(value, torch.dtype) else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, swap)
            node.kwargs = fx.node.map_aggregate(node.kwargs, swap)
