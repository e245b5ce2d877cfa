"""Comparison of masking and shrinking: whole outputs, or block by block."""

import numpy as np
import pytest
import torch
from fxprune.passes.shrink.shrink import MaskedOutputs, record_masked_outputs, verify_removal
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.errors import VerificationError
from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.compare import (
    TOLERANCE,
    PairedRuns,
    Verified,
    block_output_nodes,
    compare,
    find_divergence,
    masked_by_block,
    slim_by_block,
    slim_outputs,
)
from fxprune.offload.prefetch import offer_prefetcher, use_prefetcher
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.masking.test_parts import Watched
from tests.models import tiny
from tests.oracle import Net, discover, groups_of, masked_outputs, removal_of, slim_graph
from tests.remembered import grouped, run

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


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    return discover(Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), X)


def keep(dense: fx.GraphModule) -> Keep:
    (group,) = groups_of(dense)
    assert group.factor is not None
    return Keep({group.factor: np.array([True, False, True, True])})


def test_masked_and_slim_outputs_are_the_same_or_the_node_where_they_diverge_is_named(dense: fx.GraphModule) -> None:
    removal = removal_of(dense, keep(dense))
    masked = masked_outputs(dense, removal, X)
    slim = slim_graph(dense, keep(dense))
    assert compare(masked, slim_outputs(slim, X)) <= TOLERANCE
    assert compare(masked, slim_outputs(dense, X)) > TOLERANCE
    assert find_divergence(dense, slim, removal, X) == "the outputs"
    with torch.no_grad():
        dict(slim.named_parameters())["a.bias"].add_(1.0)
    assert find_divergence(dense, slim, removal, X).endswith("a_bias (a.bias) in the model")


def test_a_difference_above_the_tolerance_is_refused(dense: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    slim = slim_graph(dense, keep(dense))
    expected = MaskedOutputs(X, slim_outputs(slim, X), None, {})
    monkeypatch.setattr("fxprune.passes.shrink.shrink.compare", lambda *_: TOLERANCE)
    assert verify_removal(slim, expected).error == TOLERANCE
    for error in (2 * TOLERANCE, float("inf"), float("nan")):
        monkeypatch.setattr("fxprune.passes.shrink.shrink.compare", lambda *_, error=error: error)
        with pytest.raises(VerificationError, match=r"^the outputs .*: .*differ by"):
            verify_removal(slim, expected)


@pytest.mark.parametrize("changes", [False, True])
def test_paired_runs_compute_what_each_would_alone_and_fetch_weights_once(changes: bool) -> None:
    """A weight that changed is read, and fetched, again."""
    batches = [{"x": torch.randn(2, 3)} for _ in range(3)]
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, batches[0])
    prefetcher = Watched(dense)
    removal = removal_of(dense, keep(dense))
    whole = [slim_outputs(dense, batch) for batch in batches]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with offer_prefetcher(prefetcher), use_prefetcher(True), torch.no_grad():
        both = PairedRuns(dense, removal, batches)
        for node in both:
            changed = [used for used in node.all_input_nodes if used.target == "b.weight"]
            if changes and changed:
                dense.get_parameter("b.weight").zero_()
                both.rerun_masked(*changed)
            if node.op == "output":
                found = list(both.values(node.args[0]))
                assert both.has(node.args[0]) and not any(value.op == "get_attr" for value in both.dense[0].env)
            else:
                assert node in both.dense[0].env and node not in both.masked[0].env
    assert len(prefetcher.order) == 4 + changes, "four tensors, and one again if it changed"
    for batch, before, (first, second) in zip(batches, whole, found, strict=True):
        assert compare(before, [first]) == 0
        assert compare(masked_outputs(dense, removal, batch), [second]) == 0


def test_a_value_is_held_until_a_later_node_has_run(dense: fx.GraphModule) -> None:
    both = PairedRuns(dense, removal_of(dense, keep(dense)), [X])
    weight = next(node for node in both.graph.nodes if node.target == "a.weight")
    (product,) = weight.users
    behind = next(iter(product.users))
    both.keep_until(weight, behind)
    with torch.no_grad():
        for node in both:
            assert both.has(weight) == (weight < node < behind or node is behind)


INPUTS = {"input_ids": torch.arange(12).view(2, 6)}


def decided(dense: fx.GraphModule, *kinds: str) -> fx.GraphModule:
    """A graph with a removal of a third of some kinds."""
    run(dense, "l2", kinds=kinds)
    return run(dense, "select-by-ratio", ratio=0.3, protect=(), kinds=kinds)


def damage(slim: fx.GraphModule, name: str) -> None:
    with torch.no_grad():
        dict(slim.named_parameters())[name].mul_(1.01)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_outputs_block_by_block_are_those_of_whole_runs(family: str) -> None:
    dense = decided(grouped(family), "mlp", "head")
    removal = facts_of(dense)[Removal]
    arguments = dense, removal, INPUTS
    outputs, leaving = masked_by_block(*arguments)
    assert compare(masked_outputs(*arguments), outputs) == 0
    nodes = block_output_nodes(dense.graph, removal.axes)
    assert {value.block for value in leaving.values()} == set(nodes.values()) == set(removal.axes.blocks)
    assert all(removal.axes.modules[node.name].startswith(block) for node, block in nodes.items())
    slim = load_pass("shrink")(dense).graph_module
    found, errors = slim_by_block(slim, leaving, INPUTS)
    assert compare(slim_outputs(slim, INPUTS), found) < TOLERANCE and compare(outputs, found) < TOLERANCE
    assert set(errors) == set(removal.axes.blocks) and max(errors.values()) < TOLERANCE
    if family == "llama":
        damage(slim, "model.layers.0.mlp.down_proj.weight")
        _, errors = slim_by_block(slim, leaving, INPUTS)
        first, *others = (errors[block] for block in removal.axes.blocks)
        assert first > 10 * max(others) and max(others) < TOLERANCE, "a block does not answer for those before it"


def test_the_block_with_the_largest_difference_is_noted_and_removed_ones_are_not_compared() -> None:
    dense = decided(grouped("llama"), "layer")
    removal = facts_of(dense)[Removal]
    slim = load_pass("shrink", verify=True, by_block=True)(dense).graph_module
    verified = facts_of(slim)[Verified]
    assert verified.error is not None and max(verified.blocks.values()) <= verified.error < TOLERANCE
    assert verified.worst in verified.blocks and removal.removed_blocks
    assert set(verified.blocks) == set(removal.axes.blocks) - set(removal.removed_blocks)
    assert any(line.endswith(f"in {verified.worst}") for line in facts_of(slim)[Notes].lines)
    whole = load_pass("shrink", verify=True)(dense).graph_module
    assert facts_of(whole)[Verified].blocks == {} and facts_of(whole)[Verified].worst == ""


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_that_computes_something_else_is_named(inplace: bool) -> None:
    """In place, the dense weights are gone by then: without blocks, only the outputs were named."""
    dense = decided(run(trace(tiny("llama")).graph_module, "find-groups"), "mlp", "head")
    expected = record_masked_outputs(dense, by_block=True, seed=0)
    slim = Pipeline("shrink")(dense, inplace=inplace).graph_module
    damage(slim, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(VerificationError, match=r"model\.layers\.1\b"):
        verify_removal(slim, expected)
