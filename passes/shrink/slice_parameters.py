"""Cut parameters and buffers to the kept indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.graph.source import Source
from fxprune.graph.tensors import as_parameter, copy_tensor, get_tensor, names_by_identity, set_tensor, weights
from fxprune.masking.compare import Expected
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import Bypassed, Sliced
from fxprune.trace.capture import meta_twin

__all__ = ["SliceParametersPass", "slice_tensor"]


@dataclass(frozen=True, eq=False)
class SliceParametersPass(Pass):
    """Leaves of every tensor the kept indices alone, and of constants of the code too; tied tensors stay tied.

    What loses nothing is copied, so that nothing is shared with the dense model. In place on a graph that shares its
    tensors with the model it was traced from, it is left alone, and the model is given the slim tensors as well, one at
    a time, so that a dense tensor is freed as soon as its slim one is there.
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
        removal = facts[Bypassed].removal
        tied: dict[int, list[str]] = {}
        for name, tensor in weights(graph_module):
            tied.setdefault(id(tensor), []).append(name)
        source = facts.get(Source)
        mirror = source.model if source is not None and source.shares else None
        if source is not None and mirror is not None and source.dense is None:
            facts.put(replace(source, dense=meta_twin(mirror)))
        aliases = {} if mirror is None else names_by_identity(mirror)
        for names in tied.values():
            kept = next((removal.kept[name] for name in names if name in removal.kept), {})
            if not kept and mirror is not None:
                continue
            dense = get_tensor(graph_module, names[0])
            slim = slice_tensor(dense, kept) if kept else copy_tensor(dense)
            for name in names:
                set_tensor(graph_module, name, slim)
            for name in aliases.get(id(dense), ()) if mirror is not None else ():
                set_tensor(mirror, name, slim)  # type: ignore[arg-type]
        facts.put(Sliced(removal))
        return PassResult(graph_module, bool(removal.kept))


def slice_tensor(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    """Return the kept indices of each axis; of a parameter, a parameter."""
    value = tensor.detach()
    for axis, index in kept.items():
        value = value.index_select(axis, torch.tensor(index, device=value.device))
    return as_parameter(value, tensor)
