"""What masked units hold, and norms over them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxprune
from fxprune.discovery.explain import frozen_axes
from fxprune.discovery.norms import find_norms
from fxprune.errors import UnknownNameError
from fxprune.rules.probing import constant_result
from tests.oracle import Net, axes_of, check_removes_exactly, discover, graph_of, groups_of
from tests.random_networks import check_every_removal
from tests.tiers import tiers

aten = torch.ops.aten
FLOAT, MASK = torch.empty(2), torch.empty(2, dtype=torch.bool)

# name: (op, its arguments, what the first of them holds, what the op makes of it)
CALLS: dict[str, tuple[Any, tuple[Any, ...], float | None, float | None]] = {
    "relu": (aten.relu.default, (FLOAT,), 0.0, 0.0),
    "sigmoid": (aten.sigmoid.default, (FLOAT,), 0.0, 0.5),
    "sigmoid-of-anything": (aten.sigmoid.default, (FLOAT,), None, None),
    "shift": (aten.add.Tensor, (FLOAT, 1), 0.0, 1.0),
    "sum": (aten.add.Tensor, (FLOAT, FLOAT), 0.0, None),
    "product": (aten.mul.Tensor, (FLOAT, FLOAT), 0.0, 0.0),
    "times-nothing": (aten.mul.Tensor, (FLOAT, 0), None, 0.0),
    "quotient": (aten.div.Tensor, (FLOAT, FLOAT), 0.0, 0.0),
    "reciprocal": (aten.reciprocal.default, (FLOAT,), 0.0, math.nan),
    "logarithm": (aten.log.default, (FLOAT,), 0.0, math.nan),
    "root": (aten.pow.Tensor_Scalar, (FLOAT, -0.5), 0.0, math.nan),
    "masked": (aten.masked_fill.Scalar, (FLOAT, MASK, 0.0), 0.0, 0.0),
    "masked-to-infinity": (aten.masked_fill.Scalar, (FLOAT, MASK, -math.inf), 0.0, 0.0),
    "chosen": (aten.where.self, (MASK, FLOAT, FLOAT), 0.0, None),
    "truth": (aten.logical_not.default, (MASK,), 0.0, 1.0),
    "not-elementwise": (aten.mm.default, (FLOAT, FLOAT), 0.0, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_outcome_of_an_elementwise_op(name: str) -> None:
    target, arguments, number, expected = CALLS[name]
    graph = fx.Graph()
    nodes = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            nodes.append(graph.placeholder(f"x{i}"))
            nodes[-1].meta["val"] = argument
        else:
            nodes.append(argument)
    found = constant_result(graph.call_function(target, tuple(nodes)), {nodes[0]: number})
    assert found == expected or (math.isnan(found or 0) and math.isnan(expected or 0))


def written(write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A product of a copy, which `write` writes to, with itself."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        copied = h.clone()
        write(copied, h)
        return m.b(copied @ copied.mT)

    return body


# name: (what is written, whether the 12 units are exact, renormalised or frozen)
WRITES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], str]] = {
    "zeros": (lambda w, h: w[:, 0].mul_(2), "exact"),
    "other-numbers": (lambda w, h: w[:, 0].add_(1), "renormalised"),
    "through-a-view": (lambda w, h: w.view(2, 7, 12).transpose(0, 1).add_(0.5), "renormalised"),
    "from-elsewhere": (lambda w, h: w[:, 0].copy_(h[:, 1].cos()), "renormalised"),
    "no-number": (lambda w, h: w.transpose(0, 1).div_(h.transpose(0, 1)), "frozen"),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_in_place_is_seen_by_all_that_share_memory(name: str) -> None:
    write, expected = WRITES[name]
    net = Net(written(write), a=nn.Linear(5, 12), b=nn.Linear(7, 3))
    dense = check_every_removal(net, {"x": torch.randn(2, 7, 5)})
    groups = [group for group in groups_of(dense) if group.size == 12]
    found = ["renormalised" if group.renormalised else "exact" for group in groups] or ["frozen"]
    graph = graph_of(dense)
    assert found == [expected], frozen_axes(graph)


# name: (what stands between two layers of 12, sizes of exact groups, of renormalised ones)
HEADS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[int], list[int]]] = {
    "attention": (lambda h: F.scaled_dot_product_attention(h, h, h), [3, 4], []),
    "attention-to-bounded": (lambda h: F.scaled_dot_product_attention(h.sigmoid(), h.sigmoid(), h), [3], [4]),
    "norm-in-a-head": (lambda h: F.rms_norm(h, (4,)) @ h.mT @ h, [3], [4]),
    "norm-of-a-head": (lambda h: h * (h * h).sum(-1, keepdim=True), [3, 4], []),
    "own-norm-of-a-head": (lambda h: h / h.norm(dim=-1, keepdim=True), [4], [3]),
    "padded-tokens": (lambda h: (lambda g: g @ g.mT @ h)(F.pad(h, (0, 0, 1, -1))), [3, 4], []),
    "filled-tokens": (lambda h: (lambda g: g @ g.mT @ h)(F.pad(h, (0, 0, 1, -1), value=1.0)), [3], [4]),
    "sums-over-heads": (lambda h: h + h.sum(1, keepdim=True), [3, 4], []),
    "mean-over-heads": (lambda h: h + h.mean(1, keepdim=True), [4], [3]),
}


@pytest.mark.parametrize("name", HEADS)
def test_units_inside_and_outside_of_heads(name: str) -> None:
    core, exact, renormalised = HEADS[name]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(core(m.a(x).unflatten(-1, (3, 4)).transpose(1, 2)).transpose(1, 2).flatten(2))

    net = Net(body, a=nn.Linear(5, 12), b=nn.Linear(12, 3))
    dense = check_every_removal(net, {"x": torch.randn(2, 7, 5)})
    groups = groups_of(dense)
    found = [sorted(group.size for group in groups if bool(group.renormalised) is inexact) for inexact in (False, True)]
    assert found == [exact, renormalised]


def test_units_times_all_units_are_zero_where_both_are() -> None:
    """A Kronecker product of units with what they are mapped to was taken for zero where one of the two is."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x).relu()
        return m.b(torch.kron(h, h.cos()).sum(-1))

    net = Net(body, a=nn.Linear(5, 6), b=nn.Linear(49, 3))
    dense = check_every_removal(net, {"x": torch.randn(7, 5)})
    (group,) = (group for group in groups_of(dense) if group.size == 6)
    assert group.renormalised


EPS = 0.1
"""Large, so that a norm that adds the wrong number shows."""

Norm = Callable[[Any, torch.Tensor], torch.Tensor]


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
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
