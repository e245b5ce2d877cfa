"""What is found out about a graph beside its module, and what follows from it."""

from __future__ import annotations

import pytest
import torch

import fxprune
from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.trace.fidelity import Fidelity, assess, require_gradients, tolerance
from tests.models import tiny, token_ids
from tests.trace.test_probe import Two, X, changed


def test_a_graph_of_a_language_model_is_the_model() -> None:
    found = facts_of(fxprune.trace(tiny("llama")).graph_module)[Fidelity]
    assert found.error is not None and found.error <= 1e-6
    assert found.gradients is not None and found.gradients <= 1e-4
    assert found.apart == () and found.where == "" and found.notes == ()


def test_nothing_is_compared_on_meta_or_without_a_check() -> None:
    model = Two()
    assert facts_of(fxprune.trace(model, X, check=False).graph_module)[Fidelity] == Fidelity(None)
    assert facts_of(fxprune.trace(model.to("meta"), X).graph_module)[Fidelity] == Fidelity(None)


def test_where_outputs_are_apart_is_said() -> None:
    model = Two()
    graph_module = changed(model, torch.ops.aten.relu.default, torch.ops.aten.tanh.default)
    assert assess(graph_module, model, X).where.endswith(" in b")


def test_gradients_that_are_apart_are_refused_to_who_needs_them() -> None:
    graph_module = fxprune.trace(Two(), X).graph_module
    require_gradients(graph_module, "taylor")
    facts_of(graph_module).put(Fidelity(0.0, 1.0, ("a.weight", "a.bias")))
    with pytest.raises(PassError, match=r"pass taylor: the gradients of a\.weight and 1 more"):
        require_gradients(graph_module, "taylor")


def test_the_report_counts_it() -> None:
    report = fxprune.prune(tiny("llama"), token_ids(2, 8), importance="l2", ratio=0.1).report
    assert report.fidelity is not None and report.fidelity <= 1e-6
    assert report.to_dict()["gradient_fidelity"] <= 1e-4


def test_narrow_dtypes_are_compared_with_their_own_precision() -> None:
    assert tolerance(torch.float32) == tolerance(torch.float64) == 1e-5
    assert tolerance(torch.bfloat16) > tolerance(torch.float16) > 1e-3
