"""Whether stock classes can say what a plan leaves, asked before anything is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fxprune.checkpoint import describe
from fxprune.emit import emit
from fxprune.errors import CheckpointError
from fxprune.plan import Plan
from fxprune.tensors import names_by_identity
from fxprune.trace import Traced
from fxprune.trace.capture import meta_twin

__all__ = ["make_stock_test"]


def make_stock_test(traced: Traced) -> Callable[[Plan], bool]:
    """A test of plans: would the slim model load in stock transformers from its config alone?

    The slim model is built without storage, so that a plan is tested in the time its class takes to be built.
    """
    empty = meta_twin(traced.model)
    tensors = dict(empty.named_parameters(remove_duplicate=False)) | dict(empty.named_buffers(remove_duplicate=False))
    names = names_by_identity(empty)

    def accepts(plan: Plan) -> bool:
        gone = tuple(f"{block}." for block in plan.removed_blocks)
        slim: dict[str, torch.Tensor] = {}
        for aliases in names.values():
            tensor = _cut(tensors[aliases[0]], next((plan.kept[name] for name in aliases if name in plan.kept), {}))
            slim.update((name, tensor) for name in aliases if not name.startswith(gone or ("\0",)))
        model = emit(empty, slim, plan.removed_blocks).model  # type: ignore[arg-type]
        try:
            return model is not None and describe(model).is_stock
        except CheckpointError:
            return False

    return accepts


def _cut(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)]
    empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
