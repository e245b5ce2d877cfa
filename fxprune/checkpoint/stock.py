"""Whether stock classes can say what a plan leaves, asked before anything is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxprune.checkpoint import describe
from fxprune.emit import emit
from fxprune.emit.epsilons import Places
from fxprune.errors import CheckpointError
from fxprune.graph.facts import Source, within
from fxprune.graph.tensors import as_parameter, names_by_identity
from fxprune.removal.plan import Plan
from fxprune.trace.inputs import is_hugging_face, meta_twin

__all__ = ["stock_test"]


def stock_test(
    source: Source | None, epsilons: Callable[[Plan], Places] = lambda _: Places()
) -> Callable[[Plan], bool]:
    """Return a test of plans: would the slim model load in stock transformers from its config alone?

    The slim model is built without storage, so that a plan is tested in the time its class takes to be built. Of what
    is no Hugging Face model every plan passes.

    Args:
        source: the dense model.
        epsilons: where it holds the numbers that norms add, of those that a plan changes.
    """
    if source is None or not is_hugging_face(source.model):
        return lambda _: True
    empty = meta_twin(source.model)
    tensors = dict(empty.named_parameters(remove_duplicate=False)) | dict(empty.named_buffers(remove_duplicate=False))
    names = names_by_identity(empty)

    def accepts(plan: Plan) -> bool:
        slim: dict[str, torch.Tensor] = {}
        for aliases in names.values():
            tensor = _cut(tensors[aliases[0]], next((plan.kept[name] for name in aliases if name in plan.kept), {}))
            slim.update((name, tensor) for name in aliases if not within(name, plan.removed_blocks))
        model = emit(empty, slim, plan.removed_blocks, epsilons=epsilons(plan)).model  # type: ignore[arg-type]
        try:
            return model is not None and describe(model).is_stock
        except CheckpointError:
            return False

    return accepts


def _cut(tensor: torch.Tensor, kept: Mapping[int, list[int]]) -> torch.Tensor:
    """Return a tensor of the shape that is kept, without storage."""
    shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)]
    return as_parameter(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor)
