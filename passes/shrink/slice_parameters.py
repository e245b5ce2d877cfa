"""Slicing: parameters and buffers cut to the kept indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.graph.facts import Change, Cut, Fact, Runnable, Shaped, Source, facts_of
from fxprune.graph.tensors import as_parameter, copy_tensor, get_tensor, names_by_identity, set_tensor, weights
from fxprune.offload.files import offloaded
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Bypassed, Removal, Scaling, Sliced
from fxprune.trace.inputs import meta_twin

__all__ = ["SliceParametersPass", "cut_tensor", "slice_tensor"]


@dataclass(frozen=True, eq=False)
class SliceParametersPass(Pass):
    """Slices every tensor, constants of the code too, to its kept indices; tied tensors stay tied.

    Weights of norms that are kept as in the masked model are rescaled for statistics over fewer units.

    A tensor that loses nothing is copied, so that nothing is shared with the dense model. In place on a graph that
    shares its tensors with the model it was traced from, it is left alone, and the model gets the slim tensors as well,
    one at a time, so that a dense tensor is freed as soon as its slim one exists. What was cut off is kept until the
    removal is verified, so that the model can be restored.
    """

    name: ClassVar[str] = "slice-parameters"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Bypassed, Runnable, Shaped)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        removal, source = facts[Bypassed].removal, facts.get(Source)
        if source is not None and source.shares:
            _slice_in_place(graph_module, removal, source)
        else:
            for names, kept, scaling in _tied(graph_module, removal):
                slim = _rescaled(slice_tensor(get_tensor(graph_module, names[0]), kept), scaling)
                for name in names:
                    set_tensor(graph_module, name, slim)
        facts.put(Sliced(removal))
        return PassResult(graph_module, bool(removal.kept or removal.scaled))


def _slice_in_place(graph_module: fx.GraphModule, removal: Removal, source: Source) -> None:
    """Give graph and model slim tensors, one at a time; record what is cut off before the model changes."""
    facts, model = facts_of(graph_module), source.model
    aliases, source = names_by_identity(model), replace(source, dense=meta_twin(model))
    facts.put(source)
    for names, kept, scaling in _tied(graph_module, removal):
        if not kept and scaling is None:
            continue
        dense = get_tensor(graph_module, names[0])
        slim, pieces = cut_tensor(dense, kept)
        in_model = aliases.get(id(dense), ())
        if in_model:
            cut = Cut(in_model, pieces) if scaling is None else Cut(in_model, (), dense)
            source = replace(source, cut=(*source.cut, cut))
            facts.put(source)
        slim = _rescaled(slim, scaling)
        for name in in_model:
            set_tensor(model, name, slim)
        for name in names:
            set_tensor(graph_module, name, slim)


def _tied(
    graph_module: fx.GraphModule, removal: Removal
) -> Iterator[tuple[list[str], Mapping[int, list[int]], Scaling | None]]:
    """For each tensor the graph reads: its names there, the kept indices of axes that shrink, and its rescaling."""
    tied: dict[int, list[str]] = {}
    for name, tensor in weights(graph_module):
        tied.setdefault(id(tensor), []).append(name)
    kept_of, scaled = removal.kept, removal.scaled
    for names in tied.values():
        kept = next((kept_of[name] for name in names if name in kept_of), {})
        yield names, kept, next((scaled[name] for name in names if name in scaled), None)


def _rescaled(tensor: torch.Tensor, scaling: Scaling | None) -> torch.Tensor:
    return tensor if scaling is None else as_parameter(scaling.of(tensor.detach()), tensor)


def slice_tensor(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    """The kept indices of each axis, or a copy if all are kept; of a parameter, a parameter."""
    value = tensor.detach()
    for axis, index in kept.items():
        value = value.index_select(axis, torch.from_numpy(np.asarray(index, dtype=np.int64)).to(value.device))
    held = offloaded(value)
    return as_parameter(held, tensor) if kept or held is not value else copy_tensor(tensor)


def cut_tensor(
    tensor: torch.Tensor, kept: Mapping[int, list[int]]
) -> tuple[torch.Tensor, tuple[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor], ...]]:
    """As :func:`slice_tensor`, with what is cut off: see :class:`~fxprune.graph.facts.Cut`."""
    pieces = []
    value = tensor.detach()
    for axis, index in kept.items():
        stays = torch.zeros(value.shape[axis], dtype=torch.bool)
        stays[index] = True
        left, gone = (mask.nonzero()[:, 0].to(value.device) for mask in (stays, ~stays))
        pieces.append((axis, left, gone, value.index_select(axis, gone)))
        value = value.index_select(axis, left)
    return as_parameter(value, tensor), tuple(pieces)
