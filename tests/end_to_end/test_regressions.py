"""What random networks got wrong once, as small modules; and modules by hand that mix caches, masks and writes.

Each removal equals masking; what cannot go is frozen, so the groups that are left are listed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.discovery.explain import frozen_axes
from fxprune.graph.shapes import failed_check
from tests.oracle import Net, graph_of, groups_of
from tests.random_networks import check_every_removal
from tests.tiers import tiers

Body = Callable[[Any, torch.Tensor], Any]


def between(body: Body, out: int, **parts: torch.Tensor) -> Net:
    """A layer from 5 to 12 before ``body``, and one from `out` to 3 behind it."""
    return Net(lambda m, x: m.b(body(m, m.a(x))), a=nn.Linear(5, 12), b=nn.Linear(out, 3), **parts)


def p(*shape: int) -> nn.Parameter:
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
        return self.b(self.a(x) + self.table(ids)) * F.one_hot(self.order, 3).sum(0)


class Codebooks(nn.Module):
    """Token ids of several codebooks a sample, as rows of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
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


AT_ONCE = 5

PINNED = "low-rank-kronecker-of-values"
"""torch asks for numbers where it joins the axes of a Kronecker product, so batch and tokens are those of the trace."""

FOUND: dict[str, tuple[Body, list[int], list[int]]] = {}


def mixed(exact: list[int], renormalised: list[int]) -> Callable[[Body], Body]:
    """Make a function a module, whose groups have these sizes."""

    def add(body: Body) -> Body:
        FOUND[body.__name__.replace("_", "-")] = body, exact, renormalised
        return body

    return add


def joined(h: torch.Tensor) -> torch.Tensor:
    return h.transpose(1, 2).flatten(2)


@mixed([12], [])
def cache_written_by_slice(m: Any, x: torch.Tensor) -> Any:
    k = m.k(x)
    cache = k.new_zeros(k.shape[0], 8, 12)
    cache[:, : x.shape[1]] = k
    return m.o((m.q(x) @ cache.mT).softmax(-1) @ cache)


@mixed([3, 4], [])
def cache_of_heads_with_a_past(m: Any, x: torch.Tensor) -> Any:
    past = heads(m.past.expand(x.shape[0], -1, -1))
    k, v = (torch.cat((past, heads(part(x))), 2) for part in (m.k, m.v))
    return m.o(joined(F.scaled_dot_product_attention(heads(m.q(x)), k, v)))


@mixed([3, 4, 4], [])
def cache_of_heads_written_in_parts(m: Any, x: torch.Tensor) -> Any:
    k = heads(m.k(x))
    cache = k.new_zeros(k.shape[0], 3, 8, 4)
    cache[:, :, :2] = k[:, :, :2]
    cache.narrow(2, 2, 1).copy_(k[:, :, 2:3])
    return m.o(joined((heads(m.q(x)) @ cache.mT).softmax(-1) @ F.pad(heads(m.v(x)), (0, 0, 0, 8))[:, :, :8]))


@mixed([], [])
def diagonal_put_to_zero(m: Any, x: torch.Tensor) -> Any:
    h = m.k(x)
    s = h.mT @ h
    s.diagonal(dim1=-2, dim2=-1).zero_()
    return m.o(s)


@mixed([12], [12])
def filled_where_another_is_small(m: Any, x: torch.Tensor) -> Any:
    h = m.k(x)
    return m.o(h.masked_fill(m.q(x).mean(-1, keepdim=True) < 0, 0.0))


@mixed([3, 4], [])
def kronecker_layer(m: Any, x: torch.Tensor) -> Any:
    return m.o(F.linear(m.k(x), torch.kron(torch.outer(m.three, m.three), torch.outer(m.four, m.four))))


@mixed([4, 8], [])
def mixture_across_groups(m: Any, x: torch.Tensor) -> Any:
    q, k = (part(x).unflatten(-1, (3, 4)) for part in (m.q, m.k))
    return (q.softmax(-2) * k).sum(-2) @ m.w[:4]


@mixed([4, 8, 9], [3])
def experts_by_scatter(m: Any, x: torch.Tensor) -> Any:
    score = m.k(x)[..., :3]
    best = score.topk(2, -1)
    gate = torch.zeros_like(score).scatter(-1, best.indices, best.values.softmax(-1))
    return torch.einsum("bte,eio,bti->bto", gate, m.blocks, m.q(x)[..., :4])


@mixed([], [])
def token_written_over(m: Any, x: torch.Tensor) -> Any:
    h = m.k(x)
    return m.o(h.index_put((torch.tensor([1, 0]),), m.v(x)[:1], accumulate=True).select_scatter(h[:, 0].cos(), 1, 1))


@mixed([12, 12], [])
def local_attention(m: Any, x: torch.Tensor) -> Any:
    k, v = (F.pad(part(x), (0, 0, 2, 0)).unfold(1, 3, 1) for part in (m.k, m.v))
    share = torch.einsum("btd,btdw->btw", m.q(x), k).softmax(-1)
    return m.o(torch.einsum("btw,btdw->btd", share, v))


@mixed([6], [])
def halves_swapped_in_place(m: Any, x: torch.Tensor) -> Any:
    h = m.k(x)
    w = h.clone()
    w[..., :6], w[..., 6:] = h[..., 6:] * 2, h[..., :6]
    return m.o(w * m.q(x))


@mixed([4], [])
def one_head_doubled_through_a_view(m: Any, x: torch.Tensor) -> Any:
    w = m.k(x).clone()
    w.view(*x.shape[:2], 3, 4)[:, :, 0].mul_(2.0)
    return m.o(w)


@mixed([12], [])
def norm_of_tokens_and_units(m: Any, x: torch.Tensor) -> Any:
    h = m.k(x)
    return m.o(h / h.norm(dim=(1, 2), keepdim=True) + h / (1 + torch.linalg.matrix_norm(h, keepdim=True)))


@mixed([3], [])
def low_rank_kronecker_of_values(m: Any, x: torch.Tensor) -> Any:
    return F.linear(torch.kron(m.k(x), m.three), torch.kron(m.p[:, None] * m.p, m.three))


def module(body: Body) -> Net:
    """The module whose forward is ``body``, with the layers and weights that it names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (12, 12), "p": (12,), "past": (2, 12), "three": (3,), "four": (4,), "blocks": (3, 4, 4)}
    parts: dict[str, nn.Module | torch.Tensor] = {}
    for name in sorted({*body.__code__.co_names} & {*"qkvo", *shapes}):  # type: ignore[attr-defined]
        if name in shapes:
            draw = torch.randn(*shapes[name], generator=generator, dtype=torch.float64)
            parts[name] = nn.Parameter(draw / 3)
            continue
        parts[name] = layer = nn.Linear(12, 3) if name == "o" else nn.Linear(6, 12)
        for tensor in layer.to(torch.float64).parameters():
            tensor.data.normal_(generator=generator).div_(3)
    return Net(body, **parts)


@pytest.mark.parametrize("start", tiers(range(0, len(FOUND), AT_ONCE), 0))
def test_what_goes_from_mixed_modules_equals_masking(start: int) -> None:
    names = list(FOUND)[start : start + AT_ONCE]
    x, other = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 6), (3, 4, 6)))
    # beside each other, which are traced at once in little more time than one of them
    parts = nn.ModuleList(module(FOUND[name][0]) for name in names)
    several = Net(lambda m, x: tuple(part(x) for part in m.parts), parts=parts)
    dense = check_every_removal(several, {"x": x}, others={"x": other}, dynamic=True, thorough=False, accepted=1e-9)
    assert bool(failed_check(dense, {"x": other})) == (PINNED in names)
    groups = groups_of(dense)
    for i, name in enumerate(names):
        own = [group for group in groups if group.members[0].name.startswith(f"parts.{i}.")]
        sizes = [sorted(group.size for group in own if bool(group.renormalised) is some) for some in (False, True)]
        assert sizes == list(FOUND[name][1:]), (name, frozen_axes(graph_of(dense)))
