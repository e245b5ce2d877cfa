"""Norms that can be rescaled to equal masking; removing units under them is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.discovery.norms import find_norms
from fxprune.errors import UnknownNameError
from tests.oracle import Net, axes_of, check_removes_exactly, discover, groups_of
from tests.tiers import tiers

EPS = 0.1
"""Large, so that a norm that adds the wrong number shows."""

Norm = Callable[[Any, torch.Tensor], torch.Tensor]


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Divided by the root of the mean of squares."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def with_bias(n: Any, h: torch.Tensor) -> torch.Tensor:
    """A shift behind the weight: masked units hold it, and what is behind multiplies it with columns of zeros."""
    return root_mean_square(h) * n.w + n.b


# name: what a hidden width of 12 goes through; `n.w` and `n.b` are vectors of it
KEPT: dict[str, Norm] = {
    "weight-behind": lambda n, h: n.w * root_mean_square(h),
    "one-plus-weight": lambda n, h: root_mean_square(h.float()) * (1.0 + n.w.float()),
    "cast-back": lambda n, h: n.w * root_mean_square(h.float()).to(h.dtype),
    "weight-before-the-root": lambda n, h: h * n.w / (h.square().mean(-1, keepdim=True) + EPS).sqrt(),
    "power": lambda n, h: n.w * h * (h.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5),
    "bound": lambda n, h: n.w * h * h.pow(2).mean(-1, keepdim=True).clamp(min=2.5).rsqrt(),
    "nothing-added": lambda n, h: n.w * (h + 1e-3 * h) * (h * h).mean(-1, keepdim=True).rsqrt(),
    "absolute-values": lambda n, h: n.w * h / (h.abs().mean(-1, keepdim=True) + EPS),
    "scaled-after": lambda n, h: 0.5 * root_mean_square(h).unsqueeze(1).squeeze(1) * n.w,
    "fused": lambda n, h: F.rms_norm(h, (12,), n.w, EPS),
    "fused-weight-behind": lambda n, h: F.rms_norm(h, (12,), None, EPS) * n.w,
    "fused-one-plus": lambda n, h: F.rms_norm(h, (12,), 1.0 + n.w, EPS),
    "shift-behind": with_bias,
    "twice": lambda n, h: n.w * root_mean_square(n.w * root_mean_square(h)),
}

# name: the same, and a word of the reason why it stays renormalised
RENORMALISED: dict[str, tuple[Norm, str]] = {
    "no-weight": (lambda n, h: root_mean_square(h), "before a weight has been multiplied"),
    "layer-norm": (lambda n, h: F.layer_norm(h, (12,), n.w, n.b, EPS), ""),
    "mean-taken-off": (lambda n, h: n.w * (h - h.mean(-1, keepdim=True)), "neither a number nor a weight there"),
    "weight-read-elsewhere": (lambda n, h: n.w * root_mean_square(h) + n.w * h, "elsewhere"),
    "added-by-a-tensor": (
        lambda n, h: n.w * (h * (h.pow(2).mean(-1, keepdim=True) + n.e).rsqrt()),
        "neither a number nor a weight there",
    ),
    "not-zero": (lambda n, h: n.w * root_mean_square(h.cos()), "not zero"),
    "fused-default": (lambda n, h: F.rms_norm(h, (12,), n.w), ""),
    "largest": (lambda n, h: n.w * h / (h.abs().amax(-1, keepdim=True) + EPS), ""),
}


def net(norm: Norm) -> Net:
    """Two products with something between them."""
    torch.manual_seed(0)

    def body(n: Any, x: torch.Tensor) -> torch.Tensor:
        return n.b_out(norm(n, n.a_in(x)))

    vectors = {name: nn.Parameter(0.5 + torch.rand(size)) for name, size in (("w", 12), ("b", 12), ("e", 1))}
    return around(body, **vectors)


def around(body: Norm, **vectors: nn.Parameter) -> Net:
    return Net(body, a_in=nn.Linear(6, 12, bias=False), b_out=nn.Linear(12, 5), **vectors)  # type: ignore[arg-type]


def weight(size: int) -> nn.Parameter:
    return nn.Parameter(1 + torch.rand(size, generator=torch.Generator().manual_seed(2)))


INPUTS = {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", tiers(KEPT, *list(KEPT)[::3]))
def test_removing_equals_zeroing_in_the_module(name: str) -> None:
    """Whatever number of units goes, the slim graph computes what the module does with them zeroed."""
    check_removes_exactly(net(KEPT[name]), INPUTS, [12], norm="masked")
    assert [g.size for g in groups_of(discover(net(KEPT[name]), INPUTS)) if g.renormalised] == [12], "as it was"


@pytest.mark.parametrize("name", tiers(RENORMALISED, *list(RENORMALISED)[::3]))
def test_other_norms_stay_renormalised(name: str) -> None:
    norm, reason = RENORMALISED[name]
    dense = discover(net(norm), INPUTS, norm="masked")
    assert [group.size for group in groups_of(dense) if group.renormalised] == [12]
    assert axes_of(dense).norms == ()
    assert any(reason in told for told in axes_of(dense).unkept.values()) or not reason
    check_removes_exactly(net(norm), INPUTS, [], norm="masked")


def test_a_norm_over_heads_and_one_in_each() -> None:
    """Over all heads it is the share of heads that counts, in each head the share of units in it."""

    def over_all(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = n.w * root_mean_square(n.a_in(x))
        return n.b_out(h.unflatten(-1, (3, 4)).cumsum(-1).flatten(-2))  # type: ignore[no-any-return]

    def in_each(n: Any, x: torch.Tensor) -> torch.Tensor:
        return n.b_out((n.w * root_mean_square(n.a_in(x).unflatten(-1, (3, 4)))).flatten(-2))  # type: ignore[no-any-return]

    for body, size in ((over_all, 12), (in_each, 4)):
        dense = check_removes_exactly(around(body, w=weight(size)), INPUTS, [3, 4], norm="masked")
        assert [len(norm.axes) for norm in axes_of(dense).norms] == [1]


def test_one_weight_for_two_norms_changes_once_or_not_at_all() -> None:
    """Over the same axis both lose the same; where one is over heads too, no one number fits both."""

    def same(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = n.a_in(x)
        return n.b_out(n.w * root_mean_square(h) + n.w * root_mean_square(h.relu()))  # type: ignore[no-any-return]

    def other(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = n.a_in(x).unflatten(-1, (3, 4))
        whole = h * (h.pow(2).mean((-1, -2), keepdim=True) + EPS).rsqrt()
        return n.b_out((n.w * whole + n.w * root_mean_square(h)).flatten(-2))  # type: ignore[no-any-return]

    dense = check_removes_exactly(around(same, w=weight(12)), INPUTS, [12], norm="masked")
    assert axes_of(dense).unkept == {}
    dense = check_removes_exactly(around(other, w=weight(4)), INPUTS, [], norm="masked")
    assert set(axes_of(dense).unkept.values()) == {"its weight is also used elsewhere"}


def test_an_average_that_is_an_output_is_not_rescaled_and_another_treatment_is_refused() -> None:
    def body(n: Any, x: torch.Tensor) -> Any:
        h = n.a_in(x)
        scale = h.pow(2).mean(-1, keepdim=True)
        return n.b_out(n.w * h * (scale + EPS).rsqrt()), scale

    dense = discover(around(body, w=weight(12)), INPUTS, norm="masked")
    assert set(axes_of(dense).unkept.values()) == {"it is an output of the model"}
    graph = fxprune.trace(net(KEPT["fused"]), INPUTS)
    with pytest.raises(UnknownNameError, match="norm"):
        fxprune.dependency_graph(graph, norm="mask")
    assert find_norms(graph.graph_module.graph, {}, (), {}) == ((), {})
