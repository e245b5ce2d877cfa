"""Verification as passes; what they find is tested with the shrink passes."""

from __future__ import annotations

from fxprune.passes.verify import RecordExpectedPass, VerifyRemovalPass

from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.compare import Expected, Verified
from fxprune.pipeline.pipeline import Pipeline
from fxprune.trace import trace
from tests.models import tiny

DECIDE = "find-groups, l2, select-by-ratio{protect=()}, make-verification-inputs"


def test_nothing_is_run_on_meta_and_that_is_noted() -> None:
    dense = trace(tiny("llama").to("meta")).graph_module
    Pipeline(DECIDE.replace("l2", "random"))(dense)
    slim = Pipeline([RecordExpectedPass(), "shrink", VerifyRemovalPass()])(dense).graph_module
    facts = facts_of(slim)
    assert facts[Verified].error is None and facts[Expected].outputs is None
    assert "not verified: the weights are on meta" in facts[Notes].lines


def test_the_dense_graph_is_let_go_of_when_all_is_well() -> None:
    dense = trace(tiny("llama")).graph_module
    Pipeline(DECIDE)(dense)
    RecordExpectedPass()(dense)
    assert facts_of(dense)[Expected].dense is None, "its tensors are the model's own"
    slim = Pipeline([RecordExpectedPass(), "shrink"])(dense).graph_module
    assert facts_of(slim)[Expected].dense is not None
    VerifyRemovalPass()(slim)
    error = facts_of(slim)[Verified].error
    assert facts_of(slim)[Expected].dense is None and error is not None and error < 1e-5
