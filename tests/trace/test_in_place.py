"""In-place ops are replaced only if nothing else sees the tensor that they write to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.graph.compat import is_impure
from tests.oracle import Net, check_removes_exactly, plain_outputs
from tests.random_networks import check_every_removal

INPUTS = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


def writes(module: nn.Module) -> list[str]:
    """The ops of the graph of ``module`` that write to a tensor."""
    graph_module = fxprune.trace(module, INPUTS).graph_module
    assert torch.allclose(plain_outputs(module, INPUTS)[0], plain_outputs(graph_module, INPUTS)[0])
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function" and is_impure(n)]


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
