"""Propagation of the values of masked units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.discovery.explain import frozen_axes
from fxprune.rules.probing import constant_result
from tests.oracle import Net, graph_of, groups_of
from tests.random_networks import check_every_removal

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
