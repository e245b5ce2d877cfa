"""Modules written by hand that mix caches, masks, writes in place, windows, scatters and products of units.

Each removal equals masking, at two sizes; what cannot go is frozen, so the groups that are left are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.discovery.explain import frozen_axes
from fxprune.graph.shapes import failed_check
from tests.oracle import Net, graph_of, groups_of
from tests.random_networks import check_every_removal
from tests.tiers import tiers

Body = Callable[[Any, torch.Tensor], Any]
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


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (3, 4)).transpose(1, 2)


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
