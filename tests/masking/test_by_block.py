"""Every block of the slim graph is compared on what masking gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.errors import VerificationError
from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.compare import (
    TOLERANCE,
    Verified,
    compare,
    leaving_nodes,
    masked_by_block,
    masked_outputs,
    slim_by_block,
    slim_outputs,
)
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.models import tiny

DECIDE = "find-groups, l2, select-by-ratio{ratio=0.3, protect=()}, make-verification-inputs"


def decided(family: str = "llama", **options: Any) -> tuple[fx.GraphModule, Removal, Mapping[str, Any]]:
    """A dense graph, what goes, and inputs."""
    dense = trace(tiny(family, **options)).graph_module
    Pipeline(DECIDE)(dense)
    facts = facts_of(dense)
    return dense, facts[Removal], {"input_ids": torch.arange(12).view(2, 6)}


def damaged(slim: fx.GraphModule, name: str) -> None:
    """A weight is a little more."""
    with torch.no_grad():
        dict(slim.named_parameters())[name].mul_(1.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "falcon"])
def test_outputs_are_those_of_whole_runs(family: str) -> None:
    dense, removal, inputs = decided(family)
    what = dense, removal.axes, removal.keep, removal.removed_blocks, inputs
    outputs, leaving = masked_by_block(*what)
    assert compare(masked_outputs(*what), outputs) == 0
    assert {value.block for value in leaving.values()} == set(removal.axes.blocks)
    slim = Pipeline("shrink")(dense).graph_module
    found, errors = slim_by_block(slim, leaving, inputs, compare)
    assert compare(slim_outputs(slim, inputs), found) < TOLERANCE and compare(outputs, found) < TOLERANCE
    assert set(errors) == set(removal.axes.blocks) and max(errors.values()) < TOLERANCE


def test_a_block_does_not_answer_for_those_before_it() -> None:
    dense, removal, inputs = decided()
    _, leaving = masked_by_block(dense, removal.axes, removal.keep, removal.removed_blocks, inputs)
    slim = Pipeline("shrink")(dense).graph_module
    name = "model.layers.0.mlp.down_proj.weight"
    damaged(slim, name)
    _, errors = slim_by_block(slim, leaving, inputs, compare)
    first, *others = (errors[block] for block in removal.axes.blocks)
    assert first > 10 * max(others) and max(others) < TOLERANCE


def test_what_leaves_a_block_is_used_behind_it() -> None:
    dense, _, _ = decided()
    axes = facts_of(dense)[Dependencies].axes
    nodes = leaving_nodes(dense.graph, axes)
    assert set(nodes.values()) == set(axes.blocks)
    assert all(axes.modules[node.name].startswith(block) for node, block in nodes.items())


def test_blocks_that_go_as_a_whole_are_not_asked() -> None:
    dense = trace(tiny("llama")).graph_module
    select = "select-by-ratio{ratio=0.3, kinds=[layer], protect=()}, make-verification-inputs"
    Pipeline(f"find-groups, l2{{kinds=[layer]}}, {select}")(dense)
    gone = facts_of(dense)[Removal].removed_blocks
    slim = Pipeline("record-expected{by_block=True}, shrink, verify-removal")(dense).graph_module
    verified, blocks = facts_of(slim)[Verified], facts_of(dense)[Dependencies].axes.blocks
    assert gone and set(verified.blocks) == set(blocks) - set(gone) and verified.error is not None


def test_the_report_says_in_which_block_the_difference_is_largest() -> None:
    dense, _, _ = decided()
    slim = Pipeline("record-expected{by_block=True}, shrink, verify-removal")(dense).graph_module
    verified = facts_of(slim)[Verified]
    assert verified.error is not None and max(verified.blocks.values()) <= verified.error < TOLERANCE
    assert verified.worst in verified.blocks
    assert any(line.endswith(f"in {verified.worst}") for line in facts_of(slim)[Notes].lines)
    whole = Pipeline("record-expected, shrink, verify-removal")(dense).graph_module
    assert facts_of(whole)[Verified].blocks == {} and facts_of(whole)[Verified].worst == ""


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_that_computes_something_else_is_named(inplace: bool) -> None:
    """In place, the dense weights are gone by then: without this, only the outputs were named."""
    dense, _, _ = decided()
    slim = Pipeline("record-expected{by_block=True}, shrink")(dense, inplace=inplace).graph_module
    damaged(slim, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(VerificationError, match=r"model\.layers\.1\b"):
        Pipeline("verify-removal")(slim, inplace=True)
