"""Slice parameters and buffers to the kept indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxprune.dependency import axis_map
from fxprune.passbase import Pass, PassResult
from fxprune.plan import kept_of_constants
from fxprune.state import state_of
from fxprune.tensors import get_tensor, names_by_identity, set_tensor, weights

__all__ = ["SliceParametersPass", "slice_tensor"]


@dataclass(eq=False)
class SliceParametersPass(Pass):
    """Every tensor in the plan holds its kept indices alone, and so do constants of the code; tied tensors stay tied.

    Args:
        copy: give tensors that the plan does not name copies of their own, so that nothing is shared with the dense
            module.
        mirror: another module with the same names, to be given the same tensors, one at a time, so that a dense
            tensor is freed as soon as its slim one is there. None leaves other modules alone.
    """

    name: ClassVar[str] = "slice-parameters"
    stage: ClassVar[str] = "shrink"
    copy: bool = False
    mirror: nn.Module | None = None
    needs: ClassVar[tuple[str, ...]] = ("plan",)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Slice each tensor once, whatever the number of its names."""
        state = state_of(graph_module)
        plan = state.plan
        assert plan is not None
        slices = dict(plan.kept)
        if state.graph is not None and state.keep is not None:
            slices |= kept_of_constants(axis_map(state.graph), state.keep)
        tied: dict[int, list[str]] = {}
        for name, tensor in weights(graph_module):
            tied.setdefault(id(tensor), []).append(name)
        aliases = {} if self.mirror is None else names_by_identity(self.mirror)
        for names in tied.values():
            kept = next((slices[name] for name in names if name in slices), {})
            if not kept and not self.copy:
                continue
            dense = get_tensor(graph_module, names[0])
            slim = slice_tensor(dense, kept)
            for name in names:
                set_tensor(graph_module, name, slim)
            for name in aliases.get(id(dense), ()) if self.mirror is not None else ():
                set_tensor(self.mirror, name, slim)  # type: ignore[arg-type]
        return PassResult(graph_module, bool(plan.kept))


def slice_tensor(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    """The kept indices of each axis; a parameter stays one."""
    value = tensor.detach()
    for axis, index in kept.items():
        value = value.index_select(axis, torch.tensor(index, device=value.device))
    value = value if kept else value.clone()
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
