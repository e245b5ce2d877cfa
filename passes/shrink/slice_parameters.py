"""Cut parameters and buffers to the kept indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.graph.facts import Change, Cut, Fact, Runnable, Shaped, Source, facts_of
from fxprune.graph.tensors import as_parameter, copy_tensor, get_tensor, names_by_identity, set_tensor, weights
from fxprune.masking.compare import Expected
from fxprune.offload.files import stored
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Bypassed, Removal, Scaling, Sliced
from fxprune.trace.inputs import meta_twin

__all__ = ["SliceParametersPass", "cut_tensor", "slice_tensor"]


@dataclass(frozen=True, eq=False)
class SliceParametersPass(Pass):
    """Leaves of every tensor the kept indices alone, and of constants of the code too; tied tensors stay tied.

    Weights of norms that are kept as masking has them are multiplied by what these lack over fewer units.

    What loses nothing is copied, so that nothing is shared with the dense model. In place on a graph that shares its
    tensors with the model it was traced from, it is left alone, and the model is given the slim tensors as well, one at
    a time, so that a dense tensor is freed as soon as its slim one is there. What was cut off is kept until the removal
    is verified, so that the model can be made whole again.
    """

    name: ClassVar[str] = "slice-parameters"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Bypassed, Runnable, Shaped)
    keeps: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Cut each tensor once, whatever the number of its names."""
        facts = facts_of(graph_module)
        removal, source = facts[Bypassed].removal, facts.get(Source)
        if source is not None and source.shares:
            _cut_in_place(graph_module, removal, source)
        else:
            for names, kept, scaling in _tied(graph_module, removal):
                slim = slice_tensor(get_tensor(graph_module, names[0]), kept)
                _put(graph_module, names, _scaled(slim, scaling))
        facts.put(Sliced(removal))
        return PassResult(graph_module, bool(removal.kept or removal.scaled))


def _tied(
    graph_module: fx.GraphModule, removal: Removal
) -> list[tuple[list[str], Mapping[int, list[int]], Scaling | None]]:
    """For each tensor the graph reads, its names there, the kept indices of axes it loses from, and how it changes."""
    tied: dict[int, list[str]] = {}
    for name, tensor in weights(graph_module):
        tied.setdefault(id(tensor), []).append(name)
    kept_of, scaled = removal.kept, removal.scaled
    found = []
    for names in tied.values():
        kept = next((kept_of[name] for name in names if name in kept_of), {})
        found.append((names, kept, next((scaled[name] for name in names if name in scaled), None)))
    return found


def _scaled(tensor: torch.Tensor, scaling: Scaling | None) -> torch.Tensor:
    return tensor if scaling is None else as_parameter(scaling.of(tensor.detach()), tensor)


def _cut_in_place(graph_module: fx.GraphModule, removal: Removal, source: Source) -> None:
    """Give graph and model slim tensors, one at a time, and put down what was cut off as soon as it is."""
    facts, model = facts_of(graph_module), source.model
    aliases, source = names_by_identity(model), replace(source, dense=meta_twin(model))
    facts.put(source)
    for names, kept, scaling in _tied(graph_module, removal):
        if not kept and scaling is None:
            continue
        dense = get_tensor(graph_module, names[0])
        slim, pieces = cut_tensor(dense, kept)
        own = aliases.get(id(dense), ())
        if own:
            cut = Cut(own, pieces) if scaling is None else Cut(own, (), dense)
            source = replace(source, cut=(*source.cut, cut))
            facts.put(source)
        slim = _scaled(slim, scaling)
        _put(model, own, slim)
        _put(graph_module, names, slim)


def _put(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    for name in names:
        set_tensor(module, name, value)


def slice_tensor(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    """Return the kept indices of each axis, or a copy where all are kept; of a parameter, a parameter."""
    value = tensor.detach()
    for axis, index in kept.items():
        value = value.index_select(axis, torch.from_numpy(np.asarray(index, dtype=np.int64)).to(value.device))
    held = stored(value)
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
