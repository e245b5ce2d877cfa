"""Check whether stock classes can express a plan, before anything is removed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.emit.emitter import emit
from fxprune.emit.epsilons import NormEpsilons, find_epsilons
from fxprune.emit.structure import describe_structure
from fxprune.errors import CheckpointError
from fxprune.graph.facts import Source, facts_of, within
from fxprune.graph.tensors import as_parameter, names_by_identity
from fxprune.removal.plan import Plan, keep_of
from fxprune.removal.removal import scaled_numbers
from fxprune.trace.inputs import is_hugging_face, meta_twin

__all__ = ["stock_check"]


def stock_check(graph_module: fx.GraphModule, axes: AxisMap, groups: tuple[Group, ...]) -> Callable[[Plan], bool]:
    """Return a check of plans: does the slim model load in stock transformers from its config alone?

    The slim model is built without storage, so a plan is checked in the time its class takes to be built. Without a
    Hugging Face model every plan passes.
    """
    source = facts_of(graph_module).get(Source)
    if source is None or not is_hugging_face(source.model):
        return lambda _: True
    dense = source.model
    empty = meta_twin(dense)
    tensors = dict(empty.named_parameters(remove_duplicate=False)) | dict(empty.named_buffers(remove_duplicate=False))
    names = names_by_identity(empty)

    def accepts(plan: Plan) -> bool:
        slim: dict[str, torch.Tensor] = {}
        for aliases in names.values():
            dense_tensor = tensors[aliases[0]]
            kept = next((plan.kept[name] for name in aliases if name in plan.kept), {})
            shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(dense_tensor.shape)]
            tensor = as_parameter(torch.empty(shape, dtype=dense_tensor.dtype, device="meta"), dense_tensor)
            slim.update((name, tensor) for name in aliases if not within(name, plan.removed_blocks))
        epsilons = NormEpsilons()
        if axes.norms:
            numbers = scaled_numbers(axes, keep_of(axes, groups, plan))
            epsilons = find_epsilons(graph_module.graph, dense, numbers)
        model = emit(empty, slim, plan.removed_blocks, epsilons=epsilons).model  # type: ignore[arg-type]
        try:
            return model is not None and describe_structure(model).is_stock
        except CheckpointError:
            return False

    return accepts
