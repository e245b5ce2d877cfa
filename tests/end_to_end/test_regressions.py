"""What random networks got wrong once, each as the smallest module that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.discovery.explain import frozen_axes
from tests.oracle import Net, graph_of, groups_of
from tests.random_networks import check_every_removal

Body = Callable[[Any, torch.Tensor], Any]


def between(body: Body, out: int, **parts: torch.Tensor) -> Net:
    """A layer from 5 to 12 before ``body``, and one from `out` to 3 behind it."""
    return Net(lambda m, x: m.b(body(m, m.a(x))), a=nn.Linear(5, 12), b=nn.Linear(out, 3), **parts)


def p(*shape: int) -> nn.Parameter:
    """Random weights."""
    return nn.Parameter(torch.randn(*shape) / 3)


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (3, 4)).transpose(1, 2)


def feature_attention(m: Any, h: torch.Tensor) -> torch.Tensor:
    """Attention whose scores are products of positive features."""
    q, k, v = (heads(F.linear(h, w)) for w in (m.q, m.k, m.v))
    return (((F.elu(q) + 1) @ (F.elu(k) + 1).mT) @ v).transpose(1, 2).flatten(2)


def made(body: Body, out: int, **shapes: tuple[int, ...]) -> Callable[[], Net]:
    """:func:`between` with parameters of ``shapes``, made when the test runs."""
    return lambda: between(body, out, **{name: p(*shape) for name, shape in shapes.items()})


# name: (module, sizes of the groups that are exact, of those that are renormalised)
NETWORKS: dict[str, tuple[Callable[[], Net], list[int], list[int]]] = {
    # products of two activations add up over units that are not zero when they are masked
    "feature-attention": (made(feature_attention, 12, q=(12, 12), k=(12, 12), v=(12, 12)), [12, 3, 4], [4]),
    "sigmoid-squared": (made(lambda m, h: h.sigmoid() @ h.sigmoid().mT, 7), [], [12]),
    "sum-of-cosines": (made(lambda m, h: h.cos().sum(-1, keepdim=True), 1), [], [12]),
    "exponential-weight": (made(lambda m, h: h.sigmoid() @ m.w.exp(), 4, w=(12, 4)), [4], [12]),
    # and over units that are, where the same op without the function is exact
    "sigmoid-times-linear": (made(lambda m, h: h.sigmoid() @ h.mT, 7), [12], []),
    "sum-of-relus": (made(lambda m, h: h.relu().sum(-1, keepdim=True), 1), [12], []),
    "shifted-and-back": (made(lambda m, h: (h.exp() - 1).sum(-1, keepdim=True), 1), [12], []),
    # a masked unit has no value: nought by nought, one by nought, the logarithm of nought
    "normed-weight": (
        made(lambda m, h: F.linear(h, m.w / m.w.norm(dim=1, keepdim=True) * m.g), 6, w=(6, 12), g=(6, 1)),
        [12],
        [6],
    ),
    "reciprocal": (made(lambda m, h: 1 / h, 12), [], [12]),
    "logarithm": (made(lambda m, h: torch.cat((h, h.sigmoid()), -1).abs().log(), 24), [], [12]),
    # each unit of the outer axis may not choose for itself where an op brings two of them together
    "heads-that-meet": (made(lambda m, h: (heads(h) @ heads(h).mT).flatten(2), 49), [4], []),
    "units-that-meet": (
        made(lambda m, h: torch.einsum("...sd,...td->...st", h.view(2, 7, 2, 6), h.view(2, 7, 2, 6)).flatten(2), 4),
        [2, 6],
        [],
    ),
    # weights are called what nodes and inputs of the graph are called
    "names-of-nodes": (
        made(lambda m, h: F.linear(h.relu() * m.relu + m.x, m.linear), 6, relu=(12,), x=(12,), linear=(6, 12)),
        [6, 12],
        [],
    ),
    # a spread that is divided by one less than the number of units needs two
    "spread": (made(lambda m, h: h / h.std(-1, keepdim=True) + h.var(-1, keepdim=True), 12), [], [12]),
    # an axis that has one unit left is no axis of size 1
    "squeezed": (made(lambda m, h: h.unsqueeze(1).squeeze() + h.squeeze(-1) + h.squeeze((0, 2)), 12), [12], []),
    # the columns of a constant made by the code are no units, nor is what reads them
    "constant": (made(lambda m, h: F.linear(h @ torch.eye(12), m.w.exp()), 6, w=(6, 12)), [6, 12], []),
    # which masking leaves as they are: something may be divided by them
    "divided": (
        made(lambda m, h: (h.mean(-1, keepdim=True) / torch.arange(1, 7)).sin() * m.w, 6, w=(6,)),
        [6],
        [12],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_random_networks_that_failed(name: str) -> None:
    make, exact, renormalised = NETWORKS[name]
    dense = check_every_removal(make(), {"x": torch.randn(2, 7, 5)})
    found: dict[bool, list[int]] = {False: [], True: []}
    for group in groups_of(dense):
        found[bool(group.renormalised)].append(group.size)
    graph = graph_of(dense)
    assert (sorted(found[False]), sorted(found[True])) == (sorted(exact), sorted(renormalised)), frozen_axes(graph)


class Labelled(nn.Module):
    """A sequence of vectors and one of numbers, which have to have the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(5, 12), nn.Linear(12, 3), nn.Embedding(7, 12)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Vectors and numbers meet, and so does a table that only the data has the size of."""
        return self.b(self.a(x) + self.table(ids)) * F.one_hot(self.order, 3).sum(0)


class Codebooks(nn.Module):
    """Token ids of several codebooks a sample, as rows of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """A batch of one row makes no sample."""
        both = self.table(ids.view(-1, 2, ids.shape[-1])).sum(1)
        return self.b(self.a(both).relu())  # type: ignore[no-any-return]


IDS = torch.randint(7, (4, 9))


@pytest.mark.parametrize(
    ("network", "kinds", "inputs", "macs"),
    [
        (Labelled, ("mlp", "channel"), {"x": torch.randn(4, 9, 5), "ids": IDS}, (64 * 12 * (5 + 3), 64 * 6 * (5 + 3))),
        (Codebooks, ("mlp",), {"ids": IDS}, (2 * 64 * 12 * (5 + 3), 2 * 64 * 6 * (2 + 3))),
    ],
)
def test_work_is_counted_where_inputs_share_a_size_or_one_row_is_no_sample(
    network: type[nn.Module], kinds: tuple[str, ...], inputs: dict[str, torch.Tensor], macs: tuple[int, int]
) -> None:
    options = {"importance": "l2", "select": "select-by-group-ratio{group_ratio=0.5}", "protect": ()}
    assert fxprune.prune(network(), kinds=kinds, example_inputs=inputs, **options).report.macs == macs
