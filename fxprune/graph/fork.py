"""A second graph over the same tensors."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx

from fxprune.graph.facts import facts_of, set_facts
from fxprune.graph.source import Source
from fxprune.graph.tensors import copy_tensor, set_tensor, weights

__all__ = ["fork", "unshare"]


def fork(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module with a graph and facts of its own that shares tensors with ``graph_module``.

    Node names are kept. Replacing a tensor of one does not change the other.
    """
    twin = fx.GraphModule(dict(weights(graph_module)), copy.deepcopy(graph_module.graph))
    twin.train(graph_module.training)
    facts = facts_of(graph_module).copy()
    source = facts.get(Source)
    if source is not None:
        facts.put(replace(source, shares=False))
    set_facts(twin, facts)
    return twin


def unshare(graph_module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Give ``graph_module`` copies of its own of the tensors that it shares with ``other``; tied ones stay tied."""
    shared = {id(tensor) for _, tensor in weights(other)}
    copies = dict[int, torch.Tensor]()
    for name, tensor in list(weights(graph_module)):
        if id(tensor) in shared:
            if id(tensor) not in copies:
                copies[id(tensor)] = copy_tensor(tensor)
            set_tensor(graph_module, name, copies[id(tensor)])
