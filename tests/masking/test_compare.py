"""Tests: masking against shrinking: outputs compared, whole or block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.discovery.dependency import Dependencies
from fxprune.errors import VerificationError
from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.compare import (
    TOLERANCE,
    SideBySide,
    Verified,
    compare,
    find_divergence,
    leaving_nodes,
    masked_by_block,
    masked_outputs,
    require_equal,
    slim_by_block,
    slim_outputs,
)
from fxprune.offload.prefetch import Carrier, at_place, carrying
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net, axes_of, discover, groups_of, slim_graph

X = {"x": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([torch.tensor([0.5])], [torch.tensor([0.25])], 0.25),
        ([torch.tensor([8.0, 1.0])], [torch.tensor([8.0, 3.0])], 0.25),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.ones(2)], 1.0),
        ([torch.zeros(2)], [torch.zeros(3)], float("inf")),
        ([torch.zeros(2)], [torch.tensor([0.0, float("nan")])], float("inf")),
        ([torch.zeros(0)], [torch.zeros(0)], 0.0),
    ],
)
def test_the_difference_is_relative_to_the_largest_or_one(
    expected: list[torch.Tensor], actual: list[torch.Tensor], difference: float
) -> None:
    assert compare(expected, actual) == difference


def test_a_difference_above_the_tolerance_is_refused() -> None:
    require_equal(TOLERANCE, "here")
    for error in (2 * TOLERANCE, float("inf"), float("nan")):
        with pytest.raises(VerificationError, match=r"here: .*differ by"):
            require_equal(error, "here")


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    return discover(Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), X)


def keep(dense: fx.GraphModule) -> Keep:
    (group,) = groups_of(dense)
    assert group.factor is not None
    return Keep({group.factor: np.array([True, False, True, True])})


def test_masked_and_slim_outputs_are_the_same(dense: fx.GraphModule) -> None:
    masked = masked_outputs(dense, axes_of(dense), keep(dense), (), X)
    slim = slim_graph(dense, keep(dense))
    assert compare(masked, slim_outputs(slim, X)) <= TOLERANCE
    assert compare(masked, slim_outputs(dense, X)) > TOLERANCE
    assert find_divergence(dense, slim, axes_of(dense), keep(dense), (), X) == "the outputs"


def test_the_node_where_two_runs_part_is_named(dense: fx.GraphModule) -> None:
    slim = slim_graph(dense, keep(dense))
    with torch.no_grad():
        dict(slim.named_parameters())["a.bias"].add_(1.0)
    assert find_divergence(dense, slim, axes_of(dense), keep(dense), (), X).endswith("a_bias (a.bias) in the model")


def beside(batches: list[dict[str, torch.Tensor]]) -> tuple[fx.GraphModule, Keep, SideBySide]:
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, batches[0])
    (group,) = groups_of(dense)
    assert group.factor is not None
    keep = Keep({group.factor: np.array([True, False, True, True])})
    return dense, keep, SideBySide(dense, axes_of(dense), keep, (), batches)


def test_each_run_computes_what_it_would_alone() -> None:
    batches = [{"x": torch.randn(2, 3)} for _ in range(2)]
    dense, keep, both = beside(batches)
    before: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    with torch.no_grad():
        for node in both:
            if node.op == "output":
                assert both.has(node.args[0])
                before["out"] = list(both.values(node.args[0]))
            else:
                assert node in both.dense[0].env and node not in both.masked[0].env
    for batch, (whole, masked) in zip(batches, before["out"], strict=True):
        assert compare(slim_outputs(dense, batch), [whole]) == 0
        assert compare(masked_outputs(dense, axes_of(dense), keep, (), batch), [masked]) == 0
    assert not any(value.op == "call_function" for value in both.dense[0].env if value is not node)


def test_a_weight_that_changed_is_read_again() -> None:
    batches = [{"x": torch.randn(2, 3)}]
    dense, _, both = beside(batches)
    seen = None
    with torch.no_grad():
        for node in both:
            weight = next((used for used in node.all_input_nodes if used.target == "b.weight"), None)
            if weight is not None:
                dense.get_parameter("b.weight").zero_()
                both.read_again(weight)
            if node.op == "output":
                ((_, seen),) = both.values(node.args[0])
    assert seen is not None
    assert torch.allclose(seen, dense.get_parameter("b.bias").expand(2, 2))


class Counting(Carrier):
    """Carries by copies, and counts them."""

    copies = 0

    def begin(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copy a weight."""
        self.copies += 1
        return super().begin(tensor.clone())


def test_a_weight_is_carried_once_for_all_batches_of_both_runs_and_again_where_it_changed() -> None:
    batches = [{"x": torch.randn(2, 3)} for _ in range(3)]
    carrier = Counting(torch.device("cpu"))
    with carrying(carrier), at_place(True), torch.no_grad():
        dense, keep, both = beside(batches)
        weight = dense.get_parameter("b.weight")
        for node in both:
            if "b.weight" in [str(used.target) for used in node.all_input_nodes]:
                weight.zero_()
                both.read_again(*[used for used in node.all_input_nodes if used.target == "b.weight"])
            if node.op == "output":
                found = list(both.values(node.args[0]))
    assert carrier.copies == 4 + 1, "four tensors, and one anew"
    for batch, (whole, masked) in zip(batches, found, strict=True):
        assert compare(masked_outputs(dense, axes_of(dense), keep, (), batch), [masked]) == 0
        assert not torch.equal(whole, masked)


def test_a_value_is_held_until_a_later_node_has_run() -> None:
    _, _, both = beside([{"x": torch.randn(2, 3)}])
    by_name = {str(node.target): node for node in both.graph.nodes}
    weight = by_name["a.weight"]
    (product,) = weight.users
    behind = next(iter(product.users))
    both.hold(weight, behind)
    with torch.no_grad():
        for node in both:
            assert both.has(weight) == (weight < node < behind or node is behind)


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
