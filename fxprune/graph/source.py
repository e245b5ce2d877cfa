"""Where a graph came from: the model it was traced from, and the tensors that no model holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.shelf import stored
from fxprune.graph.tensors import as_parameter, get_tensor, set_tensor

__all__ = ["Constants", "Cut", "Source", "put_back", "put_values"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What a cut took off a tensor of the model: with what is left it takes no more memory than the whole.

    Args:
        names: the names of the tensor in the model.
        pieces: for each axis that was cut, in turn, the kept positions, those that went, and what stood there.
        whole: the tensor as it was, where what is left of it has other values; there are no pieces then.
    """

    names: tuple[str, ...]
    pieces: tuple[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor], ...]
    whole: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Source(Fact):
    """The model that a graph was traced from.

    Args:
        model: the model.
        names: for each tensor the graph reads, all its names in the model; none for what the model's code makes.
        example_inputs: the keyword inputs the caller traced with; None where they were made.
        shares: whether the graph still reads the model's own tensors, so that writing to one writes to the other. A
            copy of the graph does not count as sharing: its tensors are replaced before they are written to.
        dense: a copy of the model without storage, as it was before its own tensors were cut; None while it is whole.
        cut: what was cut off the model's own tensors, to be put back should the removal fail.
    """

    model: nn.Module
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example_inputs: Mapping[str, Any] | None = None
    shares: bool = True
    dense: nn.Module | None = None
    cut: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Constants(Fact):
    """The tensors a graph reads that are no parameter or buffer of the model: its code makes them.

    Args:
        names: in order of first use.
    """

    names: tuple[str, ...] = ()


def put_back(source: Source) -> None:
    """Make the model whole again of which tensors were cut in place."""
    for cut in source.cut:
        slim = get_tensor(source.model, cut.names[0])
        if any(slim.shape[axis] != len(kept) for axis, kept, _, _ in cut.pieces):
            continue  # stopped before the slim tensor was there
        value = slim.detach()
        for axis, kept, gone, piece in reversed(cut.pieces):
            shape = [*value.shape[:axis], len(kept) + len(gone), *value.shape[axis + 1 :]]
            value = value.new_empty(shape).index_copy_(axis, kept, value).index_copy_(axis, gone, piece)
        whole = as_parameter(value, slim) if cut.whole is None else cut.whole
        for name in cut.names:
            set_tensor(source.model, name, whole)


def put_values(graph_module: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Give the tensor ``name`` other values: in place where the model holds it too and is to change, else anew."""
    old, source = get_tensor(graph_module, name), facts_of(graph_module).get(Source)
    if source is not None and source.shares:
        old.copy_(value)
    else:
        set_tensor(graph_module, name, as_parameter(stored(value.to(old.dtype).contiguous()), old))
