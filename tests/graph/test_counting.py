"""Multiply-accumulates and parameters, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.graph import counting
from fxprune.graph.compat import UNKNOWN_SIZE
from fxprune.graph.counting import Work, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import facts_of
from fxprune.trace.capture import trace
from tests.oracle import Net
from tests.remembered import traced


def test_matrix_products_of_one_sample_count_whatever_the_traced_batch() -> None:
    """The work of a sample without tokens was that of all samples of the example."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 7), b=nn.Linear(7, 3))
    graph_module = trace(net, {"x": torch.zeros(4, 5)}).graph_module
    assert count_macs(graph_module) == 5 * 7 + 7 * 3
    fixed = trace(net, {"x": torch.zeros(4, 5)}, dynamic=False).graph_module
    assert count_macs(fixed) == 4 * (5 * 7 + 7 * 3), "the graph takes no other batch"
    parameters = 5 * 7 + 7 + 7 * 3 + 3
    assert count_parameters(graph_module) == parameters
    work = Work(parameters, 5 * 7 + 7 * 3, 64, memory=4 * parameters, model="Net")
    assert facts_of(graph_module)[Work] == work, "recorded with the trace"


def test_tokens_scale_the_count_and_tied_weights_count_once() -> None:
    net = Net(lambda net, x: net.out(net.table(x)), table=nn.Embedding(11, 6), out=nn.Linear(6, 11, bias=False))
    net.out.weight = net.table.weight
    graph_module = trace(net, {"x": torch.zeros(2, 5, dtype=torch.long)}).graph_module
    assert count_macs(graph_module, tokens=8) == 8 * 6 * 11
    assert count_macs(graph_module) == 64 * 6 * 11
    assert count_parameters(graph_module) == 11 * 6
    assert count_bytes(graph_module) == 4 * 11 * 6 and count_bytes(graph_module.half()) == 2 * 11 * 6


class Attention(nn.Module):
    """Fused attention; key and value heads may be fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q * self.scale, k, v, enable_gqa=q.shape[1] > k.shape[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pairs", [6, 2])
def test_fused_attention_counts_as_its_two_products(device: str, pairs: int) -> None:
    sizes = {"q": (2, 6, 5, 8), "k": (2, pairs, 7, 8), "v": (2, pairs, 7, 8)}
    inputs = {name: torch.zeros(shape, device=device) for name, shape in sizes.items()}
    traced = trace(Attention().to(device), inputs, dynamic=False)
    assert count_macs(traced.graph_module) == 2 * 6 * 5 * 7 * (8 + 8)


def test_work_that_depends_on_data_is_unknown_without_values() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.a(x[(x.sum(dim=-1) >= 0).nonzero()[:, 0]])

    net = Net(body, a=nn.Linear(5, 7))
    x = {"x": torch.zeros(4, 5)}
    assert count_macs(trace(net, x).graph_module) % (5 * 7) == 0
    assert count_macs(trace(net.to("meta"), x).graph_module) == UNKNOWN_SIZE // 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_shapes_alone_count_what_a_run_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced(family)
    quick = [count_macs(graph_module, tokens) for tokens in (64, 7)]
    assert quick[0] == counting._by_shapes(graph_module.graph, counting._chosen(graph_module.graph, 1, 64)) // 2
    monkeypatch.setattr(counting, "_by_shapes", None)
    assert quick == [count_macs(graph_module, tokens) for tokens in (64, 7)]
