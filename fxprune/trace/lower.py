"""From an ``ExportedProgram`` to a plain ``GraphModule`` bound to the real weights.

Parameters become ``get_attr`` nodes under their own names, asserts about metadata go, as nothing uses them, and devices
and the dtype of the model are read from the inputs and weights at run time, so that the module may move between both.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec

from fxprune.errors import TraceError
from fxprune.graph.compat import FakeTensor, TreeSpec, is_impure
from fxprune.trace.regions import copy_body
from fxprune.trace.signature import add_inputs, called_with, read_leaves

__all__ = ["lower"]

_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}

Specs = Sequence[tuple[fx.Node, InputSpec]]


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
