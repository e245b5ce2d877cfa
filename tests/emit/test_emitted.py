"""The Hugging Face model of a graph: which tensors it holds, and what counts as the same output."""

from __future__ import annotations

import pytest

from fxprune.axes import Keep
from fxprune.discovery.dependency import Dependencies
from fxprune.emit.emitted import Emitted, emit_from_graph
from fxprune.errors import CheckpointError
from fxprune.graph.facts import Source, facts_of
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.models import tiny, token_ids


def test_a_graph_from_which_nothing_was_removed_gives_the_model_itself() -> None:
    dense = tiny("llama", num_hidden_layers=1)
    graph_module = trace(dense).graph_module
    Pipeline("find-groups")(graph_module)
    axes = facts_of(graph_module)[Dependencies].axes
    inputs = {"input_ids": token_ids(2, 9)}
    emission = emit_from_graph(graph_module, facts_of(graph_module)[Source], Removal(axes, (), Keep()), inputs)
    model = emission.model
    assert type(model) is type(dense) and model is not dense, emission.reasons
    assert all(tensor is dict(dense.named_parameters())[name] for name, tensor in model.named_parameters())


def test_without_a_model_the_reasons_are_told() -> None:
    with pytest.raises(CheckpointError, match="no slim model to save: a; b; c"):
        Emitted(None, ("a", "b", "c", "d")).require_model()
    model = tiny("llama", num_hidden_layers=1)
    assert Emitted(model).require_model() is model
