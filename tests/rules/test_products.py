"""Products of activations and weights: convolutional, or batched over experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.rules.products import (
    lone_sliding_products,
    lone_stacked_products,
    picked_matrices,
    sliding_product,
    stacked_product,
)
from fxprune.trace import trace
from tests.oracle import Net

NUMBERS = torch.tensor([2, 0, 2, 1, 1, 0, 2])


def drawn(*shape: int) -> nn.Parameter:
    """A parameter with random values."""
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
    (found,) = lone_stacked_products(graph_module)
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
    assert not list(lone_stacked_products(graph_module))


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
    (found,) = lone_sliding_products(graph_module)
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
    assert not list(lone_sliding_products(trace(module, {"x": torch.randn(2, 6, 11)}).graph_module))
