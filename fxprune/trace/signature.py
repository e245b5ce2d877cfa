"""The inputs of a graph: called as the module is, with lists and dicts of tensors, and with what is no tensor.

A container is one input, and the tensors in it are read off it first thing. What is no tensor decided what was traced,
so the graph takes it, and refuses any other value; it may be left out if it was what the module takes it for then.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec

from fxprune.errors import TraceError
from fxprune.graph.compat import tree_map, tree_unflatten

__all__ = ["add_inputs", "called_with", "read_leaves"]

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
