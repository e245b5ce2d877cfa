"""A second graph over the same tensors."""

from __future__ import annotations

import copy

from torch import fx

from fxprune.state import attach, state_of
from fxprune.tensors import weights

__all__ = ["fork"]


def fork(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own, node names kept, that shares tensors with ``graph_module``.

    Replacing a tensor of one does not change the other. The state is a shallow copy.
    """
    twin = fx.GraphModule(dict(weights(graph_module)), copy.deepcopy(graph_module.graph))
    twin.train(graph_module.training)
    attach(twin, copy.copy(state_of(graph_module)))
    return twin
