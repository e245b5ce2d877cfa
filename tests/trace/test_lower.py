"""From exported programs to canonical graphs."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import fxprune
from fxprune.axes import Keep
from fxprune.errors import FxpruneError, TraceError
from fxprune.graph.compat import is_impure
from fxprune.graph.facts import Notes, Runnable, Shaped, facts_of
from fxprune.graph.tensors import weights
from fxprune.trace.capture import trace
from fxprune.trace.lower import lower
from tests.models import tiny, token_ids
from tests.oracle import Net, axes_of, check_removes_exactly, discover, groups_of, plain_outputs, slim_graph
from tests.random_networks import check_every_removal


class Pair(NamedTuple):
    """An output of a type of its own."""

    y: torch.Tensor
    x: torch.Tensor


def lowered(net: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> fx.GraphModule:
    return lower(torch.export.export(net.eval(), (), {"x": x}, strict=False), net, dtype)


def targets(graph_module: fx.GraphModule, op: str) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == op]


def test_weights_are_the_models_own_and_only_those_in_use() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(3, 4), unused=nn.Linear(3, 4))
    graph_module = lowered(net, torch.randn(2, 3))
    assert targets(graph_module, "get_attr") == ["a.weight", "a.bias"]
    assert graph_module.a.weight is net.a.weight and not hasattr(graph_module, "unused")
    x = torch.randn(2, 3)
    assert torch.equal(graph_module(x), net(x))


def test_regions_are_inlined_and_assertions_dropped() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            scale = x.double().to(x.device).sum()
        return net.a(x) * scale.float()

    net = Net(body, a=nn.Linear(3, 4))
    program = torch.export.export(net, (), {"x": torch.randn(2, 3)}, strict=False)
    graph_module = lower(program, net, None)
    assert any("wrap_with" in str(target) for target in (node.target for node in program.graph.nodes))
    assert not any("wrap_with" in str(t) or "assert" in str(t) for t in targets(graph_module, "call_function"))
    x = torch.randn(2, 3)
    assert torch.allclose(graph_module(x), net(x))


def test_devices_and_the_dtype_of_the_model_are_read_at_run_time() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.a(x) + torch.zeros(4, dtype=torch.bfloat16, device="cpu")

    net = Net(body, unused=nn.Linear(3, 4, dtype=torch.bfloat16), a=nn.Linear(3, 4, dtype=torch.bfloat16))
    graph_module = lowered(net, torch.randn(2, 3, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert targets(graph_module, "get_attr") == ["a.weight", "a.bias"]  # XLNet's mask embedding stayed for its dtype
    literals = [value for node in graph_module.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert not any(isinstance(value, torch.device | torch.dtype) for value in literals)
    assert graph_module.float()(torch.randn(2, 3)).dtype == torch.float32


def test_containers_are_returned_and_types_without_fields_refused() -> None:
    net = Net(lambda net, x: {"y": net.a(x), "rest": [x, (x,)]}, a=nn.Linear(3, 4))
    found = lowered(net, torch.randn(2, 3))(torch.randn(2, 3))
    assert list(found) == ["y", "rest"] and isinstance(found["rest"][1], tuple)
    named = Net(lambda net, x: Pair(net.a(x), x), a=nn.Linear(3, 4))
    with pytest.raises(TraceError, match=r"namedtuple.* has no named fields"):
        lowered(named, torch.randn(2, 3))


aten = torch.ops.aten
X = {"x": torch.randn(2, 5, 3)}


def nodes(net: nn.Module, target: object) -> list[Any]:
    return [node for node in fxprune.trace(net, X).graph_module.graph.nodes if node.target is target]


def test_values_of_a_region_without_gradients_are_detached_once() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        with torch.no_grad():
            scale = h.abs().mean() + h.sum()
        return h * scale + scale

    (detach,) = nodes(Net(body, a=nn.Linear(3, 4)), aten.detach.default)
    assert len(detach.users) == 2


def test_under_autocast_inputs_are_cast() -> None:
    """That of another device does nothing, and a nested region with gradients is not detached."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)  # type: ignore[no-any-return]

    def other(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad(), torch.enable_grad():
            return m.a(x)  # type: ignore[no-any-return]

    assert all(nodes(Net(other, a=nn.Linear(3, 4)), op) == [] for op in (aten.to.dtype, aten.detach.default))
    net = Net(body, a=nn.Linear(3, 4))
    (linear,) = nodes(net, aten.linear.default)
    assert {source.meta["val"].dtype for source in linear.all_input_nodes} == {torch.bfloat16}
    assert fxprune.trace(net, X).graph_module(**X).dtype == torch.bfloat16


class Takes(nn.Module):
    """A module with inputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, xs: Any, mode: str = "sum", weight: Any = None, more: Any = None) -> torch.Tensor:
        x = xs["p"][0] + xs["q"] if isinstance(xs, dict) else xs
        y = self.a(x) if weight is None else self.a(x * weight)
        return y if mode == "sum" else y * 2  # type: ignore[no-any-return]


T = torch.randn(2, 5, 3)


def graph_of(**inputs: Any) -> fx.GraphModule:
    return fxprune.trace(Takes(), inputs).graph_module


def parameters(graph_module: fx.GraphModule) -> dict[str, Any]:
    found = inspect.signature(graph_module.forward).parameters
    return {name: parameter.default for name, parameter in found.items()}


def test_a_container_is_one_input_and_its_leaves_are_named_after_it() -> None:
    graph_module = graph_of(xs={"p": [T], "q": T})
    assert list(parameters(graph_module)) == ["xs"]
    assert {"xs_p", "xs_p_0", "xs_q"} <= {node.name for node in graph_module.graph.nodes}
    assert graph_module(xs={"p": [T], "q": T}).shape == (2, 5, 4)
    assert graph_module({"p": [T[:, :2]], "q": T[:, :2]}).shape == (2, 2, 4)


def test_an_input_with_the_name_of_a_weight_gets_another_node_name() -> None:
    net = Net(lambda m, x: x @ m.x, x=nn.Parameter(torch.randn(3, 4)))
    graph_module = lowered(net, torch.randn(2, 3))
    assert {node.name for node in graph_module.graph.nodes} >= {"x", "x_input"}
    assert list(parameters(graph_module)) == ["x"]


def test_an_input_is_optional_only_if_it_was_its_default() -> None:
    empty = inspect.Parameter.empty
    assert parameters(graph_of(xs=T, mode="sum")) == {"xs": empty, "mode": "sum"}
    assert parameters(graph_of(xs=T, mode="double")) == {"xs": empty, "mode": empty}
    found = parameters(graph_of(weight=T[:1, :1], mode="sum", xs=T, more=None))
    assert list(found.items()) == [("xs", empty), ("mode", empty), ("weight", empty), ("more", None)]


def test_another_value_is_refused_by_name_and_an_odd_container_too() -> None:
    graph_module = graph_of(xs=T, mode="double")
    assert graph_module(T, "double").shape == (2, 5, 4)
    with pytest.raises(RuntimeError, match="mode='double' and takes no other"):
        graph_module(T, "sum")
    with pytest.raises(FxpruneError, match="xs"):
        graph_of(xs={T})


fold = importlib.import_module("fxprune.trace.canonical")  # the name ``trace`` of the package is the function

Body = Callable[[Any, torch.Tensor], torch.Tensor]

ROWS = {"x": torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))}


def net(middle: Body, width: int = 12, out: int = 12, **parts: Any) -> Net:
    a, b = nn.Linear(10, width), nn.Linear(out, 9)
    return Net(lambda m, x: m.b(middle(m, m.a(x))), a=a, b=b, **parts)


def slopes(count: int) -> torch.Tensor:
    return 2.0 ** -torch.arange(1, count + 1, dtype=torch.float32)


def constants(dense: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in dense.named_buffers() if name.startswith("constant_")}


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (4, -1)).transpose(1, 2)


def alibi(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention whose scores fall with the distance, at a slope of its own for each head."""
    q, k, v = (heads(h) for h in m.a(x).chunk(3, -1))
    places = torch.arange(x.shape[1])
    bias = -slopes(4)[:, None, None] * (places[:, None] - places[None, :]).abs()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return m.b(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def retention(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Linear attention with a decay of its own for each head, as a table over a fixed chunk and as a scan."""
    q, k, v = (heads(h) for h in m.a(x).chunk(3, -1))
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float32)))
    place = torch.arange(7)
    distance = (place[:, None] - place[None, :]).float()
    table = torch.where(distance >= 0, torch.exp(distance * decay[:, None, None]), 0.0)
    out = (q @ k.mT * table) @ v
    return m.b(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [alibi, retention])
def test_heads_go_with_their_constants(body: Body) -> None:
    dense = check_removes_exactly(Net(body, a=nn.Linear(10, 36), b=nn.Linear(12, 9)), ROWS, [4, 3, 3])
    head = next(group for group in groups_of(dense) if group.kind == "head")
    assert {member.name for member in head.members} > {"a.weight", "b.weight"}
    held = [member for member in head.members if member.name in constants(dense)]
    assert held and not any(member.trained for member in held)
    if body is alibi:
        slim = slim_graph(dense, Keep({head.factor: torch.tensor([True, False, False, True]).numpy()}))
        found = [value.flatten() for value in constants(slim).values() if value.numel() == 2]
        assert any(torch.equal(value.abs(), slopes(4)[[0, 3]]) for value in found)


def test_constants_made_of_several_ops_and_literals_are_one_buffer() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        numbers = torch.cat((torch.tensor([3.0, 1.0, 4.0]), torch.stack([torch.tensor(1.5)] * 2), slopes(7)))
        return h * numbers

    dense = check_removes_exactly(net(middle), ROWS, [12])
    assert [tuple(value.shape) for value in constants(dense).values()] == [(12,)]
    assert axes_of(dense).buffers == ("constant_0",)


def test_uniform_constants_and_values_that_depend_on_the_length_stay_in_the_graph() -> None:
    dense = check_removes_exactly(
        net(lambda m, h: h * (torch.ones(12).cumsum(0) * 0 + 2) + torch.full((12,), 0.5)), ROWS
    )
    assert constants(dense) == {}

    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h * torch.arange(h.shape[1])[:, None] + h.new_ones(h.shape[1], h.shape[1]).tril() @ h

    model, longer = net(middle), torch.randn(3, 5, 10)
    dense = check_removes_exactly(model, ROWS, [12])
    assert constants(dense) == {}
    assert torch.allclose(dense(x=longer), model(longer), atol=1e-5)


def test_random_numbers_and_written_tensors_stay_in_the_graph() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        table = torch.arange(12.0)
        first = table[:4]
        first.add_(h.sum().round())
        return h * table + torch.rand(12) * 0

    model = net(middle)
    dense = discover(model, ROWS)
    assert constants(dense) == {}
    assert torch.allclose(dense(**ROWS), model(**ROWS), atol=1e-5)


def test_large_constants_stay_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "MAX_CONSTANT_ELEMENTS", 11)
    assert constants(discover(net(lambda m, h: h * torch.arange(12)), ROWS)) == {}
    monkeypatch.setattr(fold, "MAX_CONSTANT_ELEMENTS", 12)
    assert len(constants(discover(net(lambda m, h: h * torch.arange(12)), ROWS))) == 1


def test_buffers_of_the_model_are_read_and_names_do_not_meet() -> None:
    model = net(lambda m, h: h * m.constant_0 * torch.arange(12) + m.plain * 2, constant_0=torch.randn(12))
    model.plain = torch.randn(12)
    dense = check_removes_exactly(model, ROWS, [12])
    assert dense.get_buffer("constant_0") is model.constant_0
    assert torch.equal(dense.get_buffer("constant_1"), torch.arange(12))
    assert "plain" in axes_of(dense).buffers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constants_follow_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h * (torch.arange(1, 13, device=h.device).to(h.dtype) / 3)

    model = net(middle)
    dense = discover(model, ROWS)
    assert [value.dtype for value in constants(dense).values()] == [torch.float32]
    slim = dense.to(dtype)
    assert slim(x=ROWS["x"].to(dtype)).dtype == dtype
    wide = discover(net(middle).double(), {"x": ROWS["x"].double()})
    assert [value.dtype for value in constants(wide).values()] == [torch.float64]


def test_a_numbered_embedding_is_no_zero_where_its_number_is_masked() -> None:
    """Masking sets the number of a removed unit to zero, and row zero of the table is a row like any other."""

    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        weight = m.table(torch.arange(12)).squeeze(-1)
        return (h.sigmoid() * weight).sum(-1, keepdim=True).expand(2, 7, 12)

    dense = check_removes_exactly(net(middle, table=nn.Embedding(12, 1)), ROWS)
    held = {group.name: group for group in groups_of(dense) if "constant_0" in {m.name for m in group.members}}
    assert [(group.size, len(group.renormalised)) for group in held.values()] == [(12, 1)]


def test_constants_are_where_the_model_is_and_groups_are_the_same_without_storage() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return (h * torch.arange(12, device=h.device))[..., torch.arange(3, 9)] + torch.tensor([1.0, 2, 3, 4, 5, 6])

    real, empty = net(middle, out=6), net(middle, out=6).to("meta")
    found = [discover(model, ROWS) for model in (real, empty)]
    assert {value.device.type for value in found[0].buffers()} == {"cpu"}
    assert {value.device.type for value in found[1].buffers()} == {"meta"}
    sizes = [[(group.kind, group.size) for group in groups_of(dense)] for dense in found]
    assert sizes[0] == sizes[1] == [("mlp", 3), ("mlp", 6), ("mlp", 3)]
    keep = Keep({groups_of(found[1])[1].factor: torch.arange(6).numpy() > 1})
    assert slim_graph(found[1], keep).get_parameter("b.weight").shape == (9, 4)


def test_a_graph_computes_the_same_as_the_model_with_its_tensors() -> None:
    model = tiny("llama", num_hidden_layers=1)
    config, names = model.config.to_dict(), {id(parameter) for parameter in model.parameters()}
    traced = trace(model)
    graph_module = traced.graph_module
    with torch.no_grad():
        assert torch.allclose(graph_module(input_ids=token_ids()).logits, model(token_ids()).logits, atol=1e-5)
    assert names <= {id(tensor) for _, tensor in weights(graph_module)}
    assert model.config.to_dict() == config and traced.model is model and traced.notes == ()
    facts = facts_of(graph_module)
    assert Runnable in facts and Shaped in facts and facts[Notes].lines == ()


def test_named_outputs_that_no_graph_returns_are_left_out() -> None:
    """PI0 returns the cache of its prefix, although it is called without one."""
    net = Net(lambda net, x: CausalLMOutputWithPast(None, net.a(x), DynamicCache()), a=nn.Linear(3, 4))
    x = torch.randn(2, 3)
    found = trace(net, {"x": x}).graph_module(x=x)
    assert found.keys() == {"logits"} and torch.allclose(found.logits, net(x=x).logits)


@pytest.mark.parametrize("grad", [True, False])
def test_attention_with_a_function_among_its_arguments_is_refused_with_a_way_out(grad: bool) -> None:
    """FlexAttention was a ``KeyError``, told as a defect, or advice about data-dependent Python."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        q = net.a(x)[:, None]
        with torch.set_grad_enabled(grad):
            return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))  # type: ignore[return-value]

    with pytest.raises(TraceError, match=r"flex_attention as torch\.nn\.functional\.scaled_dot_product_attention"):
        trace(Net(body, a=nn.Linear(3, 4)), {"x": torch.randn(2, 7, 3)})


INPUTS = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


def writes(module: nn.Module) -> list[str]:
    graph_module = fxprune.trace(module, INPUTS).graph_module
    assert torch.allclose(plain_outputs(module, INPUTS)[0], plain_outputs(graph_module, INPUTS)[0])
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function" and is_impure(n)]


def test_a_view_of_a_shape_is_a_reshape_and_one_of_a_dtype_stays() -> None:
    net = Net(lambda net, x: x.view(2, 6).view(torch.int32).view(torch.float32) * net.w, w=nn.Parameter(torch.ones(6)))
    ops = targets(trace(net, {"x": torch.randn(2, 2, 3)}).graph_module, "call_function")
    aten = torch.ops.aten
    assert ops[-4:] == [aten.reshape.default, aten.view.dtype, aten.view.dtype, aten.mul.Tensor]


def test_a_write_is_replaced_unless_a_view_sees_it() -> None:
    def routed(net: Net, x: torch.Tensor) -> torch.Tensor:
        """Weights of a router, made to sum to one: read, then divided in place."""
        values, _ = torch.topk(net.first(x), 2, dim=-1)
        values /= values.sum(dim=-1, keepdim=True)
        return values @ net.last

    def seen_later(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.first(x)
        row = hidden[0]
        hidden.mul_(2)
        return hidden + row

    assert writes(Net(routed, first=nn.Linear(6, 5), last=torch.randn(2, 4))) == []
    assert writes(Net(seen_later, first=nn.Linear(6, 5))) == ["aten.mul_.Tensor"]


def test_channels_pass_through_replaced_ops() -> None:
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.first(x)
        scale = hidden.sum()
        hidden *= 3
        return net.last(hidden) + scale

    check_removes_exactly(Net(body, first=nn.Linear(6, 5), last=nn.Linear(5, 4)), INPUTS)


def test_a_write_through_another_shape_is_not_lost() -> None:
    """Attention heads with a single channel have another memory layout: a reshape of them is a copy."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).view(2, 3, -1, 4).transpose(1, 2) for part in (net.q, net.k, net.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = heads.transpose(1, 2).reshape(2, 3, -1).clone()
        hidden.view(-1).add_(0.5)
        return net.o(hidden * 1)  # type: ignore[no-any-return]

    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    check_every_removal(
        Net(body, q=nn.Linear(6, 16), k=nn.Linear(6, 8), v=nn.Linear(6, 8), o=nn.Linear(16, 3)), {"x": x}
    )
