"""Shrinking: what each pass changes, leaves alone and refuses."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxprune.passes.shrink import shrink as shrinking
from fxprune.passes.shrink.shrink import record_masked_outputs, verify_removal
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.data.calibration import VerificationInputs
from fxprune.errors import PassError, VerificationError
from fxprune.graph.compat import FakeTensorProp, tree_leaves
from fxprune.graph.facts import Change, Notes, Source, facts_of, fork
from fxprune.graph.shapes import ShapedCalls
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.masking.compare import Verified
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.removal.budget import CacheSize
from fxprune.removal.removal import Bypassed, Removal
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net, axes_of, decide, discover, groups_of
from tests.tiers import tiers


def shapely() -> fx.GraphModule:
    """A graph full of sizes."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x).view(2, 3, 4)[..., -3:].repeat(1, 2, 1)
        return m.b(F.layer_norm(h.flatten(1), (18,)))  # type: ignore[no-any-return]

    return discover(Net(body, a=nn.Linear(10, 12), b=nn.Linear(18, 5)), {"x": torch.randn(2, 10)})


def keep_most(dense: fx.GraphModule) -> Keep:
    """All but the last unit of each group."""
    factors = [group.factor for group in groups_of(dense) if group.factor is not None]
    return Keep({factor: np.arange(factor.size) < factor.size - 1 for factor in factors})


def planned(dense: fx.GraphModule, keep: Keep | None = None, blocks: tuple[str, ...] = ()) -> fx.GraphModule:
    """A fork of `dense` with a plan; without arguments one that removes nothing."""
    work = fork(dense)
    decide(work, keep, blocks)
    return work


def after(name: str, graph_module: fx.GraphModule) -> fx.GraphModule:
    """What the passes before `name` in a shrink make of a graph, in place."""
    steps = load_pass("shrink").steps  # type: ignore[attr-defined]
    for step in steps[: [step.name for step in steps].index(name)]:
        step(graph_module, inplace=True)
    return graph_module


def text(graph_module: fx.GraphModule) -> str:
    """The operations of a graph, one a line."""
    nodes = (node for node in graph_module.graph.nodes if node.op in ("call_function", "output"))
    return "\n".join(f"{n.name} = {getattr(n.target, '__name__', n.target)}{n.args}" for n in nodes)


def run(name: str, graph_module: fx.GraphModule, **arguments: Any) -> PassResult:
    return load_pass(name, **arguments)(graph_module, inplace=True)


REWRITTEN = """\
sym_size_int = sym_size.int(x, 0)
eq = eq(sym_size_int, 2)
_assert_scalar_default = _assert_scalar.default(eq, 'this graph was traced for inputs with x.shape[0] == 2')
linear = linear.default(x, p_a_weight, p_a_bias)
view = reshape.default(linear, [2, 2, 3])
slice_1 = slice.Tensor(view, 2, 1, 9223372036854775807)
repeat = repeat.default(slice_1, [1, 1, 1])
flatten = flatten.using_ints(repeat, 1)
layer_norm = layer_norm.default(flatten, [4], None, None, 1e-05, False)
linear_1 = linear.default(layer_norm, p_b_weight, p_b_bias)
output = output(linear_1,)"""


def test_rewrite_literals() -> None:
    dense = shapely()
    literals = REWRITTEN
    for new, old in (("[2, 2, 3]", "[2, 3, 4]"), ("[1, 1, 1]", "[1, 2, 1]"), ("[4], None", "[18], None")):
        literals = literals.replace(new, old)
    work = after("rewrite-literals", planned(dense, keep_most(dense)))
    assert text(work) == literals
    assert run("rewrite-literals", work).modified
    assert text(work) == REWRITTEN and text(dense) == literals


def test_rewrite_literals_scales_a_size_computed_at_run_time() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        h = m.a(x).view(batch, tokens, 4, 3).transpose(1, 2).reshape(batch * 4, tokens, 3).relu()
        return m.b(h.view(batch, 4, tokens, 3).transpose(1, 2).reshape(batch, tokens, 12))  # type: ignore[no-any-return]

    dense = discover(Net(body, a=nn.Linear(10, 12), b=nn.Linear(12, 9)), {"x": torch.randn(2, 7, 10)})
    work = planned(dense, keep_most(dense))
    slim = run("shrink", work).graph_module
    assert "floordiv(mul" in text(slim)
    assert [tuple(slim(torch.randn(n, 5, 10)).shape) for n in (2, 3)] == [(2, 5, 9), (3, 5, 9)]


def test_rewrite_literals_leaves_a_size_alone_that_is_read_off_a_slim_tensor() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x).unflatten(-1, (4, 3)).transpose(1, 2).flatten(0, 1)
        h = (h.unsqueeze(0) * 2).view_as(h).relu().unflatten(0, (-1, 4))
        return m.b(h.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    dense = discover(Net(body, a=nn.Linear(10, 12), b=nn.Linear(12, 9)), {"x": torch.randn(2, 7, 10)})
    slim = run("shrink", planned(dense, keep_most(dense)), verify=True).graph_module
    assert facts_of(slim)[Verified].error < 1e-6 and "floordiv" not in text(slim)
    assert [tuple(slim(torch.randn(n, 5, 10)).shape) for n in (2, 3)] == [(2, 5, 9), (3, 5, 9)]


BYPASSED = """\
linear_2 = linear.default(x, p_blocks_2_fc_weight, p_blocks_2_fc_bias)
relu_2 = relu.default(linear_2,)
add_2 = add.Tensor(x, relu_2)
linear_3 = linear.default(add_2, p_head_weight, p_head_bias)
output = output(linear_3,)"""


def test_bypass_blocks_and_eliminate_dead_code() -> None:
    blocks = (Net(lambda m, x: x + m.fc(x).relu(), fc=nn.Linear(6, 6)) for _ in range(3))
    model = Net(lambda m, x: m.head(m.blocks(x)), blocks=nn.Sequential(*blocks), head=nn.Linear(6, 4))
    dense = discover(model, {"x": torch.randn(2, 6)})
    before = text(dense)
    work = planned(dense, blocks=("blocks.0", "blocks.1"))
    assert run("bypass-blocks", work).modified
    assert "p_blocks_0_fc_weight" in text(work)
    result = run("eliminate-dead-code", work)
    slim = result.graph_module
    assert result.modified and text(slim) == BYPASSED and text(dense) == before
    assert dict(weights(slim)).keys() == {f"{n}.{p}" for n in ("blocks.2.fc", "head") for p in ("weight", "bias")}
    assert facts_of(slim) is facts_of(work)
    assert not run("eliminate-dead-code", slim).modified
    x = torch.randn(2, 6)
    assert torch.equal(slim(x), model.head(model.blocks[2](x)))


@pytest.mark.parametrize("name", ["bypass-blocks", "slice-parameters", "rewrite-literals", "eliminate-dead-code"])
def test_an_empty_plan_changes_nothing(name: str) -> None:
    dense = shapely()
    result = run(name, after(name, planned(dense)))
    assert not result.modified
    assert text(result.graph_module) == text(dense)
    held = dict(weights(dense))
    found = dict(weights(result.graph_module))
    assert all(torch.equal(tensor, held[name]) for name, tensor in found.items())
    assert name != "slice-parameters" or all(tensor is not held[name] for name, tensor in found.items())


def test_slice_parameters_keeps_tied_tensors_tied() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(m.b(m.a(x)).relu(), m.t.weight)

    dense = discover(
        Net(body, a=nn.Embedding(11, 8), b=nn.Linear(8, 8), t=nn.Linear(8, 11)), {"x": torch.arange(6).view(2, 3)}
    )
    set_tensor(dense, "t.weight", get_tensor(dense, "a.weight").requires_grad_(False))
    run("find-groups", dense)
    assert axes_of(dense).tied == {"t.weight": "a.weight"}
    before = {name: tensor.detach().clone() for name, tensor in weights(dense)}
    work = after("slice-parameters", planned(dense, keep_most(dense)))
    plan = facts_of(work)[Bypassed].removal.plan
    assert run("slice-parameters", work).modified
    assert set(plan.kept) == set(before) == {"a.weight", "t.weight", "b.weight", "b.bias"}
    for name, tensor in weights(work):
        want = before[name]
        for axis, kept in plan.kept[name].items():
            want = want.index_select(axis, torch.tensor(kept))
        assert torch.equal(tensor, want) and isinstance(tensor, nn.Parameter)
        assert tensor.requires_grad == (name not in ("a.weight", "t.weight"))
        assert torch.equal(get_tensor(dense, name), before[name])
    assert get_tensor(work, "a.weight") is get_tensor(work, "t.weight")


def test_slice_parameters_in_place_gives_the_model_the_same_tensors() -> None:
    model = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(10, 12), b=nn.Linear(12, 9), c=nn.Linear(2, 2))
    dense = discover(model, {"x": torch.randn(2, 10)})
    untouched = model.b.bias
    decide(dense, keep_most(dense))
    run("slice-parameters", after("slice-parameters", dense))
    assert model.a.weight.shape == (11, 10) and model.b.bias is untouched
    assert all(model.get_parameter(name) is tensor for name, tensor in weights(dense))
    twin = facts_of(dense)[Source].dense
    assert twin is not None and twin.get_parameter("a.weight").shape == (12, 10)


def test_propagate_shapes_tells_new_shapes_and_where_they_do_not_fit() -> None:
    dense = shapely()
    work = after("rewrite-literals", planned(dense, keep_most(dense)))
    with pytest.raises(PassError, match=r"Runnable is stale since pass slice-parameters. Run rewrite-literals"):
        run("propagate-shapes", work)
    run("rewrite-literals", work)
    assert not run("propagate-shapes", work).modified
    values = {node.name: node.meta.get("val") for node in work.graph.nodes if node.op == "call_function"}
    shapes = [tuple(value.shape)[1:] for value in values.values() if isinstance(value, torch.Tensor)]
    assert shapes == [(6,), (2, 3), (2, 2), (2, 2), (4,), (4,), (5,)]


def run_nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of nodes whose shapes are computed from now on."""
    names, run_node = list[str](), FakeTensorProp.run_node
    monkeypatch.setattr(FakeTensorProp, "run_node", lambda self, n: names.append(n.name) or run_node(self, n))
    return names


def slimmed(model: nn.Module, kinds: str, importance: str = "l2") -> fx.GraphModule:
    """The slim graph of a model that loses a third of the units of a kind everywhere."""
    select = f"select-by-group-ratio{{kinds={kinds}, group_ratio=0.34, protect=[]}}"
    return Pipeline(f"find-groups, {importance}{{kinds={kinds}}}, {select}, shrink")(
        trace(model).graph_module
    ).graph_module


@pytest.mark.parametrize("case", tiers(["llama head", "gpt2 layer", "mixtral mlp"], "gpt2 layer"))
def test_shapes_worked_out_where_something_changed_are_those_of_all(case: str) -> None:
    family, kinds = case.split()
    slim = slimmed(tiny(family), kinds)
    some = shapes_of(slim)
    facts_of(slim).drop(ShapedCalls, "the test")
    run("propagate-shapes", slim)
    assert shapes_of(slim) == some


def test_shapes_are_worked_out_again_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, work = run_nodes(monkeypatch), shapely()
    run("propagate-shapes", work)
    looked.clear()
    run("propagate-shapes", work)
    always = [node.name for node in work.graph.nodes if node.op == "output" or node.meta.get("val") is None]
    assert looked == ["x", *always] and "repeat" not in looked
    looked.clear()
    repeat = next(node for node in work.graph.nodes if node.name == "repeat")
    repeat.args = (repeat.args[0], [1, 1, 2])  # twice as long in the other direction: a weight of 18 fits as well
    run("propagate-shapes", work)
    assert [name for name in looked if name not in always] == ["x", "repeat", "flatten"]


@pytest.mark.slow
def test_of_blocks_that_lost_as_much_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the shapes are those of looking at all, at other depths too."""
    counts, looked = list[int](), run_nodes(monkeypatch)
    for layers in (2, 3):
        slim = slimmed(tiny("llama", num_hidden_layers=layers), "mlp")
        facts_of(slim).drop(ShapedCalls, "the test")
        looked.clear()
        run("propagate-shapes", slim)
        counts.append(len([name for name in looked if "linear" in name or "mul" in name]))
        some = shapes_of(slim)
        facts_of(slim).drop(ShapedCalls, "the test")
        with monkeypatch.context() as patch:
            patch.setattr(shrinking, "shape_key", MagicMock(side_effect=TypeError))
            run("propagate-shapes", slim)
        assert shapes_of(slim) == some
    assert counts[0] == counts[1]


def test_without_storage_what_stands_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a trace are said to be on the CPU: worked out on ``meta``, none stood, and all were looked at again."""
    looked, model, shapes = dict[str, list[str]](), tiny("llama", num_hidden_layers=2), {}
    for device in ("cpu", "meta"):
        with monkeypatch.context() as patch:
            looked[device] = run_nodes(patch)
            slim = slimmed(model.to(device), "mlp", "random")
        shapes[device] = shapes_of(slim)
        leaves = [leaf for node in slim.graph.nodes for leaf in tree_leaves(node.meta.get("val"))]
        assert {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)} == {"cpu"}
    assert looked["meta"] == looked["cpu"] and "cos" not in looked["meta"]
    assert shapes["meta"] == shapes["cpu"]


def shapes_of(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Shape and type of what each node computes."""
    leaves = {node.name: tree_leaves(node.meta.get("val")) for node in graph_module.graph.nodes if node.op != "output"}
    return {
        name: [(str(v.shape), v.dtype) if isinstance(v, torch.Tensor) else str(v) for v in values]
        for name, values in leaves.items()
    }


def test_verification_accepts_what_is_right_and_names_the_node_where_it_is_not() -> None:
    dense = discover(
        Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 9)), {"x": torch.randn(2, 10)}
    )
    decide(dense, keep_most(dense))
    work = fork(dense)
    facts_of(work).put(replace(facts_of(work)[Source], shares=False))
    expected = record_masked_outputs(work, by_block=False, seed=0)
    assert expected.dense is not None
    slim = run("shrink", work).graph_module
    error = verify_removal(slim, expected).error
    assert error is not None and error <= 1e-6
    with torch.no_grad():
        get_tensor(slim, "a.bias").add_(1)
    with pytest.raises(VerificationError, match=r"^a\.bias|^p_a_bias|^linear "):
        verify_removal(slim, expected)
    with pytest.raises(VerificationError, match="inplace=False to see the node"):
        verify_removal(slim, replace(expected, dense=None))


def test_nothing_is_run_on_meta_and_that_is_noted() -> None:
    dense = trace(tiny("llama").to("meta")).graph_module
    slim = Pipeline("find-groups, random, select-by-ratio{protect=()}, shrink{verify}")(dense).graph_module
    assert facts_of(slim)[Verified].error is None
    assert "not verified: the weights are on meta" in facts_of(slim)[Notes].lines


@dataclass(frozen=True, eq=False)
class HalveBiasPass(Pass):
    """Trains a bias, in its way."""

    name: ClassVar[str] = "halve-bias"
    stage: ClassVar[str] = "tune"
    changes: ClassVar[Change] = "weights"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        get_tensor(graph_module, "b.bias").data.mul_(0.5)
        return PassResult(graph_module, True)


def test_a_verification_is_of_one_removal_whatever_is_trained_after_it() -> None:
    """A tuning pass of one's own left a report that the slim model was never compared; a second removal has its own."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    dense = trace(net, {"x": torch.randn(2, 10)}).graph_module
    steps = ("find-groups", "l2", "select-by-ratio{ratio=0.2, protect=()}")
    tuned = Pipeline([*steps, "shrink{verify}", HalveBiasPass()])(dense).graph_module
    assert facts_of(tuned)[Verified].error is not None
    again = Pipeline([*steps, "shrink"])(tuned).graph_module
    assert Verified not in facts_of(again)


def test_shrinking_records_the_cache_before_and_after() -> None:
    """Keys and values of a token: two bytes a number, for the key/value heads of each layer."""
    dense = trace(tiny("llama")).graph_module
    select = "select-by-group-ratio{kinds=[head], group_ratio=0.34, protect=[1, 0]}"
    Pipeline(f"find-groups, l2{{kinds=[head]}}, {select}")(dense)
    removal = facts_of(dense)[Removal]
    left = sum(removal.keep.count(g.factor) for g in removal.groups if g.name.endswith("/head") and g.factor)
    assert left == 3 + 2 + 2
    slim = load_pass("shrink")(dense).graph_module
    assert facts_of(slim)[CacheSize] == CacheSize(2 * 2 * 8 * 9, 2 * 2 * 8 * left)


def test_verification_inputs_are_those_of_the_trace_or_random_by_seed() -> None:
    x = torch.randn(3, 10)
    dense = trace(Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(10, 4), b=nn.Linear(4, 2)), {"x": x}).graph_module
    Pipeline("find-groups, l2, select-by-ratio")(dense)
    record_masked_outputs(dense, by_block=False, seed=0)
    assert facts_of(dense)[VerificationInputs].values["x"] is x
    model = trace(tiny("llama")).graph_module
    Pipeline("find-groups, l2, select-by-ratio{protect=()}")(model)
    made = [record_masked_outputs(model, by_block=False, seed=seed).inputs["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
