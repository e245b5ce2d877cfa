"""Rules of ops without weights: the groups that each leaves free, and that removing them is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.discovery.explain import explain, frozen_axes
from tests.oracle import Net, axes_of, check_removes_exactly, discover, graph_of, shape_of
from tests.tiers import tiers

Middle = Callable[[torch.Tensor], torch.Tensor]

WIDTH = 12


def between(
    middle: Middle, width: int = WIDTH, shape: tuple[int, ...] = (2, 7, 10)
) -> tuple[Net, dict[str, torch.Tensor]]:
    """Two linear layers, 10 to 12 and `width` to 9, with `middle` between them."""
    net = Net(lambda m, x: m.b(middle(m.a(x))), a=nn.Linear(10, WIDTH), b=nn.Linear(width, 9))
    return net, {"x": torch.randn(shape)}


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (4, 3))


# name: (function, width after it, sizes of the groups that may be removed)
SHAPES: dict[str, tuple[Middle, int, list[int]]] = {
    "unflatten-flatten": (lambda h: heads(h).flatten(-2), 12, [4, 3]),
    "view": (lambda h: h.view(2, 7, 2, 6).reshape(2, 7, -1), 12, [2, 6]),
    "view_as": (lambda h: h.view(2, 7, 4, 3).view_as(h), 12, [4, 3]),
    "views-that-interleave": (lambda h: (heads(h) + 1).reshape(2, 7, 3, 4).transpose(-1, -2).flatten(-2), 12, []),
    "squeeze": (lambda h: h.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(), 12, [12]),
    "expand": (lambda h: h.unsqueeze(-2).expand(2, 7, 3, 12).flatten(-2), 36, [12, 3]),
    "expand_as-over-units": (lambda h: h.sum(-1, keepdim=True).expand_as(h), 12, [12]),
    "repeat": (lambda h: h.repeat(3, 1, 1, 2)[1], 24, [12, 2]),
    "repeat_interleave": (lambda h: h.repeat_interleave(2, -1), 24, [12, 2]),
    "cat": (lambda h: torch.cat((h, h.relu()), -1), 24, [12]),
    "cat-of-the-empty": (lambda h: torch.cat((h[..., 12:], h), -1), 12, [12]),
    "stack": (lambda h: torch.stack((h, h.relu()), -1).flatten(-2), 24, [12]),
    "split": (lambda h: h.split(4, -1)[0] * h.split(4, -1)[2], 4, [4, 4]),
    "split-uneven": (lambda h: torch.cat(h.split(5, -1)[::-1], -1), 12, [5, 5, 2]),
    "chunk": (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], 6, [6]),
    "chunk-uneven": (lambda h: torch.cat(h.chunk(5, -1)[::-1], -1), 12, [3, 3, 3, 3]),
    "tensor_split": (lambda h: torch.cat(torch.tensor_split(h, 3, -1)[::-1], -1), 12, []),
    "select": (lambda h: heads(h)[..., 1, :] + heads(h).select(-2, -1), 3, [3]),
    "slice": (lambda h: h[..., 3:9], 6, [3, 6, 3]),
    "slice-from-the-end": (lambda h: h[..., -5:], 5, [7, 5]),
    "slice-between-ends": (lambda h: h[..., -9:-4], 5, [3, 5, 4]),
    "slice-past-the-end": (lambda h: h[..., 3:100], 9, [3, 9]),
    "slice-nothing": (lambda h: torch.cat((h[..., 5:3], h), -1), 12, [5, 7]),
    "slice-rotate-half": (lambda h: torch.cat((-h[..., -6:], h[..., :-6]), -1) + h, 12, [6]),
    "slice-step": (lambda h: h[..., 1::3], 4, [4]),
    "slice-step-that-does-not-divide": (lambda h: h[..., ::5], 3, []),
    "slice-through-units": (lambda h: (heads(h) * heads(h).relu()).flatten(-2)[..., 4:], 8, []),
    "narrow-from-the-end": (lambda h: h.narrow(-1, -5, 5), 5, [7, 5]),
    "repeat_interleave-of-a-size": (lambda h: h.repeat_interleave(2, -1, output_size=24), 24, [12, 2]),
    "pad-shift": (lambda h: F.pad(h, (1, -1)), 12, []),
    "pad-tokens": (lambda h: F.pad(h, (0, 0, 1, -1)), 12, [12]),
}

VALUES: dict[str, tuple[Middle, int, list[int]]] = {
    **{f.__name__: (f, 12, [12]) for f in (F.relu, F.gelu, F.silu, torch.cos)},
    "glu": (lambda h: F.glu(h, -1), 6, [6]),
    "maximum": (lambda h: torch.max(h, -0.2 * h) + torch.min(h, h * h), 12, [12]),
    "in-place": (lambda h: h.mul_(2).add_(1), 12, [12]),
    "dtype": (lambda h: h.to(torch.float64).square().float(), 12, [12]),
    "softmax-in-a-head": (lambda h: heads(h).softmax(-1).flatten(-2), 12, [4]),
    "mean": (lambda h: h * h.mean(-1, keepdim=True), 12, []),
    "mean-in-a-head": (lambda h: heads(h).mean(-1), 4, [4]),
    "sum-over-heads": (lambda h: heads(h).sum(-2), 3, [4, 3]),
    "sum-all": (lambda h: h * h.sum(), 12, [12]),
    "einsum-sum": (lambda h: h * torch.einsum("bsd->bs", h.sigmoid())[..., None], 12, []),
    "normalize-in-a-head": (lambda h: F.normalize(heads(h), dim=-1).flatten(-2), 12, [4, 3]),
    "var_mean": (lambda h: h / (1 + torch.var_mean(h, 1, keepdim=True)[0]), 12, [12]),
    "argmax-tokens": (lambda h: h * h.argmax(1, keepdim=True), 12, [12]),
    "cumsum": (lambda h: h.cumsum(-1), 12, [12]),
    "topk-in-a-head": (lambda h: heads(h).topk(2, -1)[0].flatten(-2), 8, [4]),
    "index-tokens": (lambda h: h[:, torch.tensor([3, 1])], 12, [12]),
    "index-two-axes": (lambda h: h[torch.tensor([0, 1]), torch.tensor([2, 3])], 12, [12]),
    "index-apart": (lambda h: heads(h)[torch.tensor([0, 1]), :, torch.tensor([2, 3])], 3, [3]),
    "rms_norm-in-a-head": (lambda h: F.rms_norm(heads(h), (3,)).flatten(-2), 12, [4]),
    "zeros_like": (lambda h: h + torch.zeros_like(h) + torch.ones_like(h), 12, [12]),
    "full": (lambda h: h * h.new_ones(12) + torch.full((12,), 0.3) + torch.zeros(7, 1), 12, [12]),
    # no parameter produces the columns of these constants, so they are no units
    "ones-beside": (lambda h: torch.cat((h, torch.ones(2, 7, 3)), -1), 15, [12]),
    "arange": (lambda h: h * torch.arange(12), 12, [12]),
    "arange-over-heads": (lambda h: (heads(h) * torch.arange(4)[:, None]).flatten(-2), 12, [4, 3]),
    "eye": (lambda h: h @ torch.eye(12), 12, [12]),
    "constant": (lambda h: h * torch.tensor([float(i) for i in range(1, 13)]), 12, [12]),
}


@pytest.mark.parametrize("name", tiers(SHAPES, *list(SHAPES)[::3]))
def test_ops_that_move_axes(name: str) -> None:
    middle, width, groups = SHAPES[name]
    check_removes_exactly(*between(middle, width), groups)


@pytest.mark.parametrize("name", tiers(VALUES, *list(VALUES)[::3]))
def test_ops_that_change_values(name: str) -> None:
    middle, width, groups = VALUES[name]
    check_removes_exactly(*between(middle, width), groups)


@pytest.mark.parametrize("middle", [lambda h: h.t().t(), lambda h: h.T.T], ids=["t", "T"])
def test_transposes_of_matrices(middle: Middle) -> None:
    check_removes_exactly(*between(middle, shape=(3, 10)), [12])


# ------------------------------------------------------------------------------------------------ ops without a rule


@pytest.mark.parametrize(
    ("middle", "width", "op"),
    [
        (lambda h: torch.fft.rfft(h).abs(), 7, "aten.fft_rfft.default"),
        (lambda h: h.cummax(-1)[0], 12, "aten.cummax.default"),
        (lambda h: h.cummin(-1)[0], 12, "aten.cummin.default"),
        (lambda h: torch.cdist(h, h), 7, "aten.cdist.default"),
    ],
)
def test_an_op_without_a_rule_freezes_its_axes_and_is_named(middle: Middle, width: int, op: str) -> None:
    net, inputs = between(middle, width)
    dense = check_removes_exactly(net, inputs, [])
    graph = graph_of(dense)
    assert op in axes_of(dense).unruled.values()
    reasons = frozen_axes(graph)
    for axis in ("a.weight[0]", "a.bias[0]", "b.weight[1]"):
        assert reasons[axis].reason == f"no rule for {op}"
        assert reasons[axis].node in axes_of(dense).unruled
    with pytest.raises(fxprune.FxpruneError, match=f"no rule for {op}"):
        explain(graph, ("a.weight", 0))


def test_inputs_and_outputs_of_the_model_are_frozen() -> None:
    net = Net(lambda m, x: (m.b(m.a(x)), m.a(x)), a=nn.Linear(10, 12), b=nn.Linear(12, 9))
    dense = discover(net, {"x": torch.randn(3, 10)})
    graph = graph_of(dense)
    assert {name: freeze.reason for name, freeze in frozen_axes(graph).items()} == {
        "a.weight[0]": "an output of the model",
        "a.weight[1]": "an input of the model",
        "a.bias[0]": "an output of the model",
        "b.weight[0]": "an output of the model",
        "b.weight[1]": "an output of the model",
        "b.bias[0]": "an output of the model",
    }


def test_cut_and_split_axes_are_printed_by_their_factors() -> None:
    net, inputs = between(lambda h: (heads(h) * heads(h).softmax(1)).flatten(-2)[..., :6].repeat(1, 1, 2))
    assert shape_of(discover(net, inputs), "b.weight") == ["a:9", "(b:2 * c:2 * d:3)"]
