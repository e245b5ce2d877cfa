"""Notations, sites of ops, numeric properties, and products with weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.rules.probing import scaled_literal, scaling_power, shift_of
from fxprune.rules.products import (
    SlidingProduct,
    StackedProduct,
    lone_products,
    picked_matrices,
    sliding_product,
    stacked_product,
    weight_product,
)
from fxprune.rules.registry import alias_roots, may_alias, moves_values, read_notation, regroups, writes
from fxprune.trace import trace
from tests.oracle import Net

aten = torch.ops.aten

# notation of aten::linear, part of the error
WRONG = {
    "no-arrow": ("input[*b, i]", "no ->"),
    "no-brackets": ("input, weight[o, i] -> out[o]", "'input, weight"),
    "no-axis": ("input[*b, ij] -> out[*b, ij]", "'ij' is not an axis"),
    "unknown-argument": ("x[*b, i], weight[o, i] -> out[*b, o]  sums i", "no argument x"),
    "gone-without-a-clause": ("input[*b, i], weight[o, i] -> out[*b, o]", "no clause determines i"),
    "from-nowhere": ("input[*b, i] -> out[*b, i, o]", "output axes o are not in the inputs"),
    "summed-but-there": ("input[*b, i] -> out[*b, i]  sums i", "a summed or picked axis"),
    "summed-but-nowhere": ("input[*b] -> out[*b]  sums i", "a summed or picked axis"),
    "two-stars": ("input[*a, *b] -> out[*a, *b]", "more than one"),
    "twice-in-one": ("input[i, i] -> out[i]", "an axis twice"),
    "one-and-any": ("input[*b], weight[b] -> out[*b]", "one axis and for any number"),
    "same-tensor-twice": ("input[i], input[j] -> out[i, j]", "a tensor occurs twice"),
    "no-clause": ("input[*b, i] -> out[*b]  sum i", "is not a clause"),
    "by-what": ("input[*b, i] -> out[*b]  i by rows", "a clause names rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_notation_is_refused_when_it_is_registered(name: str) -> None:
    text, what = WRONG[name]
    with pytest.raises(FxpruneError, match="notation of aten::linear") as caught:
        fxprune.rule("linear", notation=text)
    assert what in str(caught.value)


def test_an_op_that_is_not_loaded_yet_may_have_any_arguments() -> None:
    assert read_notation("x[i] -> out[i]", "mylib::not_there").added == ""


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("input[*b, i], weight[o, i], bias[o]? -> out[*b, o]  sums i", "bias"),
        ("input[*b, i], weight[o, i] -> out[*b, o]  sums i", ""),
    ],
)
def test_the_added_tensor_of_a_product_has_no_summed_letter(text: str, added: str) -> None:
    assert read_notation(text, "aten::linear", multiplies=True).added == added


@pytest.mark.parametrize(
    ("op", "moves"),
    [
        ("aten.view.default", True),
        ("aten.to.dtype", True),
        ("<built-in function getitem>", True),
        ("aten.linear.default", False),
        ("aten.embedding.default", False),
        ("mylib.op.default", False),
        ("a.weight", False),
    ],
)
def test_ops_that_only_move_values_are_known_by_their_text(op: str, moves: bool) -> None:
    assert moves_values(op) is moves


def graph_of(module: nn.Module, *shape: int) -> fx.Graph:
    return fxprune.trace(module.eval(), {"x": torch.randn(shape)}).graph_module.graph


class Written(nn.Module):
    """Two weights, one of them transposed, and a view that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Parameter(torch.randn(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).clone()
        h.transpose(0, 1)[0].mul_(2)
        return h @ self.down


def test_a_write_through_a_view_has_the_root_of_the_view() -> None:
    graph = graph_of(Written(), 2, 5)
    root = alias_roots(graph)
    (written,) = (node for node in graph.nodes if writes(node))
    assert root[written].target is aten.clone.default
    views = [node for node in graph.nodes if may_alias(node) and root[node] is root[written]]
    assert len(views) >= 2 and not any(regroups(node) for node in views)


def test_products_name_their_weight_and_bias() -> None:
    graph = graph_of(Written(), 2, 5)
    found = {str(p.weight.target): p for node in graph.nodes if (p := weight_product(node)) is not None}
    assert {name: product.axis for name, product in found.items()} == {"up.weight": 1, "down": 0}
    added = found["up.weight"].added
    assert added is not None and added.target == "up.bias" and found["down"].added is None


Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Two(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.unread = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def last(function: Function) -> tuple[fx.Node, list[fx.Node]]:
    """The last op of a function, and the inputs."""
    graph = trace(Two(function), {"x": torch.rand(3, 4), "y": torch.rand(3, 4)}).graph_module.graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return nodes[-1], [node for node in graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize(
    ("function", "power"),
    [
        (lambda x, y: x.rsqrt(), -0.5),
        (lambda x, y: x**3, 3.0),
        (lambda x, y: x * y, 1.0),
        (lambda x, y: y / x, -1.0),
        (lambda x, y: x.relu(), 1.0),
        (lambda x, y: x.sign(), 0.0),
        (lambda x, y: x + y, None),
        (lambda x, y: x.exp(), None),
        (lambda x, y: x + 1, None),
        (lambda x, y: -x, 1.0),
        (lambda x, y: torch.complex(y, x), None),
        (lambda x, y: torch.complex(x, x), 1.0),
    ],
)
def test_scaling_powers(function: Function, power: float | None) -> None:
    """A scaled imaginary part once counted as no scaling, as if a weight had absorbed it."""
    node, (x, _) = last(function)
    assert scaling_power(node, {x: 1.0}) == power
    twice = scaling_power(node, {x: 2.0})
    assert twice == (None if power is None else 2 * power)


@pytest.mark.parametrize(
    "function", [lambda x, y: x + 0.1, lambda x, y: x.clamp(min=0.1), lambda x, y: x - 0.1, lambda x, y: 0.1 - x]
)
def test_an_added_number_or_bound_must_be_scaled_too(function: Function) -> None:
    node, (x, y) = last(function)
    found = scaled_literal(node, {x: -1.0})
    assert found is not None and found[1:] == (1.0, -1.0)
    assert scaled_literal(node, {x: -1.0, y: 1.0}) is None


def test_no_literal_makes_up_for_a_nonlinear_op() -> None:
    node, (x, _) = last(lambda x, y: (2.0 * x).exp())
    assert scaled_literal(node, {node.all_input_nodes[0]: -1.0}) is None
    assert scaling_power(node, {x: 1.0}) == 0.0, "it does not read it"


def test_the_shift_of_an_op_is_found_and_both_inputs_scale() -> None:
    node, (x, y) = last(lambda x, y: x + y)
    assert scaling_power(node, {x: 0.5, y: 0.5}) == 0.5 and scaling_power(node, {x: 0.5, y: 1.0}) is None
    for function, shift in ((lambda x, y: 1 + x, 1.0), (lambda x, y: x - 0.5, -0.5), (lambda x, y: 2 * x, None)):
        assert shift_of(last(function)[0]) == shift


NUMBERS = torch.tensor([2, 0, 2, 1, 1, 0, 2])


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


STACKED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "bmm": (lambda m, x: torch.bmm(x, m.w), (3, 7, 5), (3, 5, 4)),
    "bmm, weight first": (lambda m, x: torch.bmm(m.w, x), (3, 5, 7), (3, 4, 5)),
    "einsum, rows between": (lambda m, x: torch.einsum("iate,oei->aeto", x, m.w), (5, 2, 7, 3), (4, 3, 5)),
    "picked": (lambda m, x: torch.bmm(m.w[NUMBERS], x[..., None]), (7, 5), (3, 4, 5)),
    "picked by index_select": (
        lambda m, x: torch.einsum("ti,tio->to", x, m.w.index_select(0, NUMBERS)),
        (7, 5),
        (3, 5, 4),
    ),
    "picked along another axis": (lambda m, x: torch.einsum("ti,oti->to", x, m.w[:, NUMBERS]), (7, 5), (4, 3, 5)),
}


@pytest.mark.parametrize("name", STACKED)
def test_a_stacked_product_is_recomputed_from_its_parts(name: str) -> None:
    body, shape, weight = STACKED[name]
    model, x = Net(body, w=drawn(*weight)), torch.randn(shape)
    graph_module = trace(model, {"x": x}).graph_module
    (found,) = lone_products(graph_module)
    assert isinstance(found, StackedProduct)
    source = found.source.args[0] if name == "picked" else found.source
    assert source.op == "placeholder" and found.weight.target == "w"  # type: ignore[union-attr]
    w = model.w.permute(found.order)  # type: ignore[operator]
    w = w if found.picked is None else w[NUMBERS]
    rows = (x[..., None] if name == "picked" else x).permute(found.source_order)
    out = body(model, x).permute(found.out_order)
    assert torch.allclose(torch.einsum("b...i,boi->b...o", rows, w), out, atol=1e-5)


OTHERS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "one matrix": (lambda m, x: x @ m.w, (3, 7, 5), (5, 4)),
    "the same inputs for all": (lambda m, x: torch.einsum("ti,eio->teo", x, m.w), (7, 5), (3, 5, 4)),
    "two sums": (lambda m, x: torch.einsum("tei,eio->to", x, m.w), (7, 3, 5), (3, 5, 4)),
    "added to": (lambda m, x: torch.baddbmm(x.new_ones(3, 7, 4), x, m.w), (3, 7, 5), (3, 5, 4)),
    "used twice": (lambda m, x: torch.bmm(x, m.w) + torch.bmm(x + 1, m.w), (3, 7, 5), (3, 5, 4)),
    "picked and used twice": (
        lambda m, x: (p := m.w[NUMBERS], torch.bmm(p, x[..., None]) + p.sum(-1, True))[1],
        (7, 5),
        (3, 4, 5),
    ),
    "picked by truth values": (
        lambda m, x: torch.bmm(x, m.w[torch.tensor([True, False, True])]),
        (2, 7, 5),
        (3, 5, 4),
    ),
    "rows in another order": (lambda m, x: torch.einsum("abei,eio->ebao", x, m.w), (2, 7, 3, 5), (3, 5, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_are_not_stacked_products(name: str) -> None:
    body, shape, weight = OTHERS[name]
    graph_module = trace(Net(body, w=drawn(*weight)), {"x": torch.randn(shape)}).graph_module
    assert not any(isinstance(found, StackedProduct) for found in lone_products(graph_module))


def test_other_nodes_are_not_products() -> None:
    graph = trace(Net(lambda m, x: m.w[NUMBERS].sum() + x.relu(), w=drawn(3, 4, 5)), {"x": torch.ones(2)}).graph_module
    picked = [found for node in graph.graph.nodes if (found := picked_matrices(node)) is not None]
    assert len(picked) == 1 and (picked[0].along, picked[0].axes) == (0, (0, 1, 2))
    assert not any(stacked_product(node) or sliding_product(node) for node in graph.graph.nodes)


SLIDING: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(5, 4, 3, stride=2, padding=1, dilation=2), (2, 5, 11)),
    "pointwise": (nn.Conv1d(5, 4, 1, bias=False), (2, 5, 11)),
    "conv2d": (nn.Conv2d(5, 4, (2, 3)), (2, 5, 6, 7)),
    "transposed": (nn.ConvTranspose1d(5, 4, 3, stride=2), (2, 5, 11)),
}


@pytest.mark.parametrize("name", SLIDING)
@torch.no_grad()
def test_a_sliding_product_is_recomputed_from_its_inputs(name: str) -> None:
    module, shape = SLIDING[name]
    x = torch.randn(shape)
    graph_module = trace(Net(lambda m, x: m.a(x), a=module), {"x": x}).graph_module
    (found,) = lone_products(graph_module)
    assert isinstance(found, SlidingProduct)
    weight = dict(module.named_parameters())["weight"]
    inputs = found.inputs({found.source: x, found.weight: weight}, torch.arange(5))
    out = (inputs @ weight.permute(found.order).flatten(1).T).movedim(-1, found.outputs)
    bias = dict(module.named_parameters()).get("bias")
    assert found.bias is (bias is not None)
    out = out if bias is None else out + bias.view(-1, *[1] * (x.dim() - 2))
    assert torch.allclose(out, module(x), atol=1e-5)
    some = found.inputs({found.source: x, found.weight: weight}, torch.tensor([1, 4]))
    assert torch.equal(some, inputs.unflatten(-1, (5, -1))[..., [1, 4], :].flatten(-2))


@pytest.mark.parametrize("groups", [2, 6])
def test_channels_in_groups_are_left_out(groups: int) -> None:
    module = Net(lambda m, x: m.a(x), a=nn.Conv1d(6, 6, 3, groups=groups))
    assert not list(lone_products(trace(module, {"x": torch.randn(2, 6, 11)}).graph_module))
