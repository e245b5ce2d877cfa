"""Running the rule of an op, on a node of a graph or on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.axes import new_factor
from fxprune.graph.compat import UNKNOWN_SIZE, size_hint
from fxprune.graph.tensors import output_name, tensor_name
from fxprune.rules.registry import find_rule
from fxprune.rules.routing import follow_positions
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Statements, TensorAxes

__all__ = ["Descriptions", "apply_rule", "describe", "fresh_axes", "run_alone"]


def fresh_axes(name: str, value: Any, weight: bool = False) -> TensorAxes:
    """A tensor whose axes are factors unlike any other."""
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    return TensorAxes(name, tuple(new_factor(size_hint(size)) for size in shape), weight)


def _fresh_results(node: fx.Node, weight: bool) -> TensorAxes | tuple[TensorAxes, ...]:
    """The tensors that ``node`` makes, one or several, with fresh axes; none where it makes none."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return fresh_axes(tensor_name(node), value, weight)
    if isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value):
        return tuple(fresh_axes(output_name(node, i), item, weight) for i, item in enumerate(value))
    return ()


def apply_rule(node: fx.Node, stated: Statements) -> OpSite:
    """State everything about ``node``, a call of an op whose inputs are known."""
    inputs = [stated.tensors[name] for n in node.all_input_nodes if (name := tensor_name(n)) in stated.tensors]
    weight = bool(inputs) and all(isinstance(x, TensorAxes) and x.weight for x in inputs)
    found = _fresh_results(node, weight)
    outs = (found,) if isinstance(found, TensorAxes) else found
    if outs:
        stated.tensors[node.name] = found
    site = OpSite(node, stated, outs)
    for axis in (axis for out in outs for axis in out.axes if axis.size == UNKNOWN_SIZE):
        site.freeze_expr(axis, "its size depends on the data")
    rule = find_rule(node.target)
    if rule is None and outs:
        stated.unruled[node.name] = str(node.target)
        site.freeze_all(f"no rule for {node.target}")
    elif rule is not None:
        try:
            rule.state(site)
        except Exception as error:  # a use the rule was not written for: whatever it, a user's own too, trips over
            stated.unruled[node.name] = str(node.target)
            site.freeze_all(f"the rule for {node.target} does not cover this use ({type(error).__name__})")
            site.understood.clear()
    follow_positions(site, None if rule is None else rule.values)
    return site


def run_alone(node: fx.Node) -> tuple[OpSite, Statements]:
    """The rule of ``node`` by itself: its inputs are tensors that share no axis."""
    stated = Statements()
    for source in node.all_input_nodes:
        weight = _is_weight(source)
        found = _fresh_results(source, weight)
        if found:
            stated.tensors[tensor_name(source)] = found
    return apply_rule(node, stated), stated


def _is_weight(node: fx.Node) -> bool:
    """Whether ``node`` is made of parameters and buffers alone."""
    seen, pending = {node}, [node]
    while pending:
        here = pending.pop()
        if here.op == "placeholder" or (here.op == "call_function" and not here.all_input_nodes):
            return False
        new = [source for source in here.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return True


def describe(node: fx.Node) -> str:
    """The rule of ``node`` by itself, as text: ``linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i``."""
    return str(run_alone(node)[0])


class Descriptions:
    """The rules of many nodes. What is said depends on the op, on shapes and on the other arguments alone."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def of(self, op: OpSite) -> str:
        """As :func:`describe`."""
        node = op.node
        results = tuple(x.sizes for x in op.outs)  # sizes among the arguments may be computed at run time
        keywords = tuple(node.kwargs), _form(op, tuple(node.kwargs.values()))
        key = (node.target, _form(op, node.args), keywords, results)
        if key not in self._known:
            self._known[key] = describe(node)
        return self._known[key]


def _form(op: OpSite, argument: Any) -> Any:
    """What stands for an argument: sizes for a tensor, whether it was met before, and all else as it is."""
    if isinstance(argument, fx.Node):
        found = op.all_of(argument)
        return (op.node.all_input_nodes.index(argument), *(x.sizes for x in found))
    if isinstance(argument, list | tuple):
        return tuple(_form(op, item) for item in argument)
    return argument if argument is None or isinstance(argument, int | str) else repr(argument)
