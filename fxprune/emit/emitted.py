"""The slim Hugging Face model of a slim graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from transformers import PreTrainedModel

from fxprune.emit.emitter import Emission, emit
from fxprune.emit.epsilons import exaggerated, find_places
from fxprune.emit.judge import Judge
from fxprune.emit.names import slim_name
from fxprune.errors import CheckpointError
from fxprune.graph.blocks import Blocks, within
from fxprune.graph.exporting import tidy_later
from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.silence import quiet
from fxprune.graph.source import Constants, Source
from fxprune.graph.tensors import copy_tensor, weights
from fxprune.removal.norms import scaled_numbers
from fxprune.removal.plan import kept_of_constants
from fxprune.removal.removal import Removal

__all__ = ["Emitted", "emit_from_graph"]


@dataclass(frozen=True, eq=False)
class Emitted(Fact):
    """The slim Hugging Face model, or why there is none.

    Args:
        model: shares its tensors with the graph; None where no class can express the plan.
        reasons: why there is none; empty where there is one.
    """

    model: PreTrainedModel | None
    reasons: tuple[str, ...] = ()

    def require_model(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            CheckpointError: there is none.
        """
        if self.model is None:
            raise CheckpointError(
                f"there is no slim model to save: {'; '.join(self.reasons[:3])}",
                where="model",
                remedy="Export the graph instead: result.export('model.pt2')",
            )
        return self.model


def emit_from_graph(
    slim: fx.GraphModule, source: Source, removal: Removal, inputs: Mapping[str, torch.Tensor]
) -> Emission:
    """Return a model of the source's class that holds the tensors of a slim graph and computes what it does.

    Args:
        slim: the slim graph.
        source: the dense model it came from; a Hugging Face model.
        removal: what was removed.
        inputs: keyword inputs on which graph and model have to agree.
    """
    dense: PreTrainedModel = source.model if source.dense is None else source.dense  # type: ignore[assignment]
    judge = Judge(slim, dense, inputs)
    epsilons = find_places(slim.graph, dense, scaled_numbers(removal.axes, removal.keep))
    tensors, removed = _tensors(slim, source, removal), removal.removed_blocks
    with tidy_later(), quiet():  # around all that is built and run: each of these alone costs more than a small block
        emission = emit(dense, tensors, removed, judge, _numbered(slim, removal), epsilons)
    if emission.model is None or not epsilons.values:
        return emission
    names = {path: slim_name(path, removed) or path for path, _ in epsilons.values}
    with exaggerated(slim.graph, emission.model, epsilons, names):
        reads = Judge(slim, dense, inputs).agrees(emission.model)
    return emission if reads else Emission(None, (f"{next(iter(names))}: its norm does not read what it is to add",))


def _tensors(slim: fx.GraphModule, source: Source, removal: Removal) -> dict[str, torch.Tensor]:
    """Every tensor of the slim model by its dense name; what the graph does not read comes from the dense model."""
    tensors = {name: tensor for own, tensor in weights(slim) for name in source.names.get(own, ())}
    model = source.model
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if name not in tensors and not within(name, removal.removed_blocks):
                tensors[name] = tensor if source.shares else copy_tensor(tensor)
    return tensors


def _numbered(slim: fx.GraphModule, removal: Removal) -> dict[str, dict[int, list[int]]]:
    """Units that stay of the tables the model's code makes by number: by block that reads one (else empty), by size."""
    facts, axes = facts_of(slim), removal.axes
    blocks, constants = facts[Blocks].paths, facts[Constants].names
    found: dict[str, dict[int, list[int]]] = {}
    kept_of = kept_of_constants(axes, removal.keep)
    for node in slim.graph.nodes:
        if node.op != "get_attr" or node.target not in constants:
            continue
        stack = node.meta.get("nn_module_stack") or {}
        block = next((path for path, _ in stack.values() if path in blocks), "")
        for axis, kept in kept_of.get(str(node.target), {}).items():
            found.setdefault(block, {})[axes.tensors[str(node.target)][axis].size] = kept
    return found
