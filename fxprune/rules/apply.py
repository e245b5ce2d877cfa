"""Applying the rule of an op: to a node of a graph, or to a node in isolation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.axes import new_factor
from fxprune.graph.compat import UNKNOWN_SIZE, size_hint
from fxprune.graph.context import Refusal
from fxprune.graph.tensors import output_name, tensor_name, upstream
from fxprune.rules.registry import find_rule
from fxprune.rules.routing import follow_positions
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Statements, TensorAxes


def fresh_axes(name: str, value: Any, weight: bool = False) -> TensorAxes:
    """The tensor ``value`` under ``name``, each axis a fresh factor."""
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    return TensorAxes(name, tuple(new_factor(size_hint(size)) for size in shape), weight)


def _fresh_results(node: fx.Node, weight: bool) -> tuple[TensorAxes, ...]:
    """The tensors that ``node`` makes, one or several, with fresh axes; ``()`` if it makes none."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (fresh_axes(tensor_name(node), value, weight),)
    if isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value):
        return tuple(fresh_axes(output_name(node, i), item, weight) for i, item in enumerate(value))
    return ()


def apply_rule(node: fx.Node, stated: Statements) -> OpSite:
    """State everything about ``node``, a call of an op whose inputs are known."""
    inputs = [(x, name) for name in map(tensor_name, node.all_input_nodes) for x in stated.tensors.get(name, ())]
    outs = _fresh_results(node, bool(inputs) and all(x.weight and x.name == name for x, name in inputs))
    if outs:
        stated.tensors[node.name] = outs
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
        except Exception as error:  # a use that the rule, perhaps a user's own, was not written for
            stated.unruled[node.name] = str(node.target)
            site.freeze_all(f"the rule for {node.target} does not cover this use ({Refusal(error)})")
            site.understood.clear()
    follow_positions(site)
    return site


def apply_rule_alone(node: fx.Node) -> tuple[OpSite, Statements]:
    """The rule of ``node`` in isolation: its inputs are tensors that share no axis."""
    stated = Statements()
    for source in node.all_input_nodes:
        begins = (here.op for here in upstream([source]) if not here.all_input_nodes)
        found = _fresh_results(source, not {"placeholder", "call_function"}.intersection(begins))
        if found:
            stated.tensors[tensor_name(source)] = found
    return apply_rule(node, stated), stated


def describe_once(op: OpSite, known: dict[str, str]) -> str:
    """The rule of a node in isolation: ``linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i``.

    ``known`` is a cache by op, shapes and other arguments, which is added to.
    """
    node = op.node
    tensors = {source: (i, [x.sizes for x in op.all_of(source)]) for i, source in enumerate(node.all_input_nodes)}
    arguments = fx.map_arg((node.args, node.kwargs), tensors.__getitem__)
    key = repr((node.target, arguments, [x.sizes for x in op.outs]))  # sizes may be computed at run time
    if key not in known:
        known[key] = str(apply_rule_alone(node)[0])
    return known[key]
