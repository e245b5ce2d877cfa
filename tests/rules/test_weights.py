"""Rules of ops that have weights or mix tokens: products, convolutions, norms, embeddings, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.discovery.explain import explain
from tests.oracle import Net, axes_of, check_removes_exactly, discover, graph_of, groups_of, shape_of
from tests.tiers import tiers


def convolved(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.n(m.a(x)))  # type: ignore[no-any-return]


def around(module: nn.Module, groups: list[int], first: int = 12, second: int = 12) -> tuple[Any, ...]:
    """A module with random weights and statistics between two convolutions."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2) if "var" in name else nn.init.normal_(value)
    parts = {"a": nn.Conv1d(10, first, 3), "n": module, "b": nn.Conv1d(second, 9, 1)}
    return convolved, parts, groups, (2, 10, 15)


IDS = torch.arange(14).view(2, 7) % 11

W2 = {"w": (10, 12), "v": (12, 9)}

# name: (function, shapes of weights or modules, sizes of the groups that may be removed, the input if not (2, 7, 10))
CASES: dict[str, Any] = {
    "matmul": (lambda m, x: (x @ m.w).relu() @ m.v, W2, [12]),
    "baddbmm-experts": (
        lambda m, x: torch.baddbmm(m.c, torch.baddbmm(m.b, x.expand(4, 7, 10), m.w).relu(), m.v).sum(0),
        {"w": (4, 10, 12), "v": (4, 12, 9), "b": (4, 1, 12), "c": (4, 1, 9)},
        [12, 4],
        (1, 7, 10),
    ),
    "einsum-ellipsis": (
        lambda m, x: torch.einsum("...h,ho->...o", torch.einsum("...d,dh->...h", x, m.w).relu(), m.v),
        *(W2, [12]),
    ),
    "einsum-experts": (
        lambda m, x: torch.einsum("bseh,ehd->bsd", torch.einsum("bsd,edh->bseh", x, m.w).relu(), m.v),
        *({"w": (4, 10, 12), "v": (4, 12, 9)}, [4, 12]),
    ),
    "outer": (
        lambda m, x: m.b(torch.outer(x.mean((0, 1)), m.s).flatten()),
        *({"b": nn.Linear(12, 9), "s": (4,)}, [4], (2, 7, 3)),
    ),
    "tied-and-transposed": (lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.T), {"w": (12, 10)}, [12]),
    "weights-put-together": (
        lambda m, x: m.b(F.linear(x, torch.cat((m.u, m.v)))),
        *({"u": (5, 10), "v": (7, 10), "b": nn.Linear(12, 9)}, [5, 7]),
    ),
    "residual": (
        lambda m, x: m.o(m.i(x) + m.b(m.a(m.i(x)).relu())),
        {"a": nn.Linear(8, 12), "b": nn.Linear(12, 8), "i": nn.Linear(10, 8), "o": nn.Linear(8, 9)},
        [8, 12],
    ),
    "buffer": (
        lambda m, x: m.b(m.a(x) * m.s),
        *({"a": nn.Linear(10, 12), "b": nn.Linear(12, 9), "s": torch.arange(1.0, 13)}, [12]),
    ),
    "conv-depthwise-wider": around(nn.Conv1d(6, 12, 3, groups=6), [6, 2], first=6),
    "conv-grouped": around(nn.Conv1d(12, 8, 3, groups=4), [4, 3, 2], second=8),
    "conv-transpose-grouped": (
        convolved,
        {
            **{"a": nn.Conv2d(3, 12, 3), "b": nn.Conv2d(8, 9, 1)},
            "n": nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1, groups=4),
        },
        *([4, 3, 2], (2, 3, 5, 6)),
    ),
    "conv-of-one-tap": (convolved, {"a": nn.Linear(10, 12), "n": nn.Conv1d(7, 5, 1), "b": nn.Linear(12, 9)}, [12]),
    "batch_norm": around(nn.BatchNorm1d(12), [12]),
    "group_norm": around(nn.GroupNorm(4, 12), [4]),
    "group_norm-of-each": around(nn.GroupNorm(12, 12), [12]),
    "instance_norm-plain": around(nn.InstanceNorm1d(12), [12]),
    **{
        str(f): (convolved, {"a": nn.Conv2d(3, 12, 3), "b": nn.Conv2d(12, 9, 1), "n": f}, [12], (2, 3, 12, 14))
        for f in (
            nn.MaxPool2d(2, padding=1),
            nn.AdaptiveMaxPool2d((2, 3)),
            nn.Upsample(size=(5, 4), mode="bilinear"),
            nn.ReplicationPad2d((1, 2, 0, 1)),
            nn.ZeroPad2d(1),
        )
    },
    "pixel-shuffle": (
        convolved,
        {"a": nn.Conv2d(3, 12, 3), "b": nn.Conv2d(3, 9, 1), "n": nn.PixelShuffle(2)},
        *([3], (2, 3, 5, 6)),
    ),
    "unfold-image": (
        lambda m, x: m.b(F.unfold(m.a(x), 2).mT),
        *({"a": nn.Conv2d(3, 5, 3), "b": nn.Linear(20, 9)}, [5], (2, 3, 5, 6)),
    ),
    "embedding-tied": (
        lambda m, x: F.linear(m.b(m.a(x)).relu(), m.a.weight),
        *({"a": nn.Embedding(11, 12), "b": nn.Linear(12, 12)}, [12], IDS),
    ),
    "embedding-of-positions": (
        lambda m, x: m.b(m.a(x) + m.n(torch.arange(7)) + m.t[IDS]),
        {"a": nn.Embedding(11, 12), "b": nn.Linear(12, 9), "n": nn.Embedding(20, 12), "t": (11, 12)},
        *([12], IDS),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_and_layers(name: str) -> None:
    body, parts, groups, *given = CASES[name]
    made = {key: nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part for key, part in parts.items()}
    x = given[0] if given else (2, 7, 10)
    check_removes_exactly(Net(body, **made), {"x": torch.randn(x) if isinstance(x, tuple) else x}, groups)


def attention(queries: int, keys: int, *, fused: bool = True, mask: torch.Tensor | None = None, **options: Any) -> Net:
    """Attention of `queries` heads of width 6 (5 for values) over `keys` key heads, by SDPA or spelled out."""

    def split(t: torch.Tensor, count: int) -> torch.Tensor:
        return t.unflatten(-1, (count, -1)).transpose(1, 2)

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split(m.q(x), queries), split(m.k(x), keys), split(m.v(x), keys)
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=queries != keys, **options)
        else:
            k = k[:, :, None].expand(2, keys, queries // keys, 7, -1).reshape(2, queries, 7, -1)
            scores = q @ k.mT * 0.3 + (0 if mask is None else mask)
            out = scores.softmax(-1) @ v.repeat_interleave(queries // keys, 1)
        return m.o(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    widths = {"q": queries * 6, "k": keys * 6, "v": keys * 5}
    return Net(body, **{n: nn.Linear(10, w) for n, w in widths.items()}, o=nn.Linear(queries * 5, 9))


ATTENTION: dict[str, tuple[Callable[[], Net], list[int]]] = {
    "plain": (lambda: attention(4, 4), [4, 6, 5]),
    "causal": (lambda: attention(4, 4, is_causal=True), [4, 6, 5]),
    "masked": (lambda: attention(4, 4, mask=torch.randn(7, 7)), [4, 6, 5]),
    "grouped": (lambda: attention(6, 2, is_causal=True), [2, 3, 6, 5]),
    "grouped-mask-by-head": (lambda: attention(6, 2, mask=torch.randn(6, 7, 7)), [2, 3, 6, 5]),
    "one-key-head": (lambda: attention(4, 1), [4, 6, 5]),
    "spelled-out": (lambda: attention(4, 4, fused=False, mask=torch.randn(7, 7)), [4, 6, 5]),
    "spelled-out-grouped": (lambda: attention(6, 2, fused=False, mask=torch.randn(6, 1, 1)), [2, 3, 6, 5]),
}


@pytest.mark.parametrize("name", tiers(ATTENTION, "grouped", "spelled-out"))
def test_attention(name: str) -> None:
    make, groups = ATTENTION[name]
    check_removes_exactly(make(), {"x": torch.randn(2, 7, 10)}, groups)


def test_learnt_queries_are_free_unless_a_mask_is_causal() -> None:
    def net(causal: bool) -> Net:
        def body(m: Any, x: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(m.q.expand(2, 5, 12), m.k(x), m.v(x), is_causal=causal)
            return m.o(out).mT @ m.z  # type: ignore[no-any-return]

        parts = {"k": nn.Linear(10, 12), "v": nn.Linear(10, 8), "o": nn.Linear(8, 9)}
        return Net(body, q=nn.Parameter(torch.randn(1, 5, 12)), z=nn.Parameter(torch.randn(5, 3)), **parts)

    inputs = {"x": torch.randn(2, 7, 10)}
    check_removes_exactly(net(False), inputs, [5, 8, 12])
    check_removes_exactly(net(True), inputs, [8, 12])


# ------------------------------------------------------------------------------------------------- solved axes


def test_grouped_queries_are_key_heads_times_repeats_times_width() -> None:
    dense = discover(attention(6, 2), {"x": torch.randn(2, 7, 10)})
    assert shape_of(dense, "q.weight") == ["(a:2 * b:3 * c:6)", "d:10"]
    kv, rep, width = axes_of(dense).tensors["q.weight"][0].parts  # type: ignore[union-attr]
    assert axes_of(dense).tensors["k.weight"][0].parts == (kv, width)  # type: ignore[union-attr]
    kinds = {g.factor: (g.kind, g.outer) for g in groups_of(dense)}
    assert kinds[kv] == ("head", None)
    assert kinds[rep] == ("head", kv)
    assert kinds[width][0] == "head_dim"
    steps = explain(graph_of(dense), ("o.weight", 1))  # type: ignore[arg-type]
    assert steps[0].source.tensor == "q.weight" and steps[-1].target == ("o.weight", 1)
    assert any("scaled_dot_product_attention" in step.op for step in steps)


@pytest.mark.parametrize("layout", ["q|k|v", "heads*(q|k|v)"])
def test_a_fused_projection_is_solved_as_its_layout(layout: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        if layout == "q|k|v":
            q, k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in m.w(x).split(24, -1))
        else:
            q, k, v = m.w(x).view(2, 7, 4, 18).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.o(out.transpose(1, 2).reshape(2, 7, 24))  # type: ignore[no-any-return]

    net = Net(body, w=nn.Linear(10, 72), o=nn.Linear(24, 9))
    dense = check_removes_exactly(net, {"x": torch.randn(2, 7, 10)}, [4, 6, 6])
    read = {"q|k|v": "[(a:4 * b:6) | (a:4 * b:6) | (a:4 * c:6)]", "heads*(q|k|v)": "(a:4 * [b:6 | b:6 | c:6])"}
    assert shape_of(dense, "w.weight")[0] == read[layout]
    assert shape_of(dense, "o.weight")[1] == "(b:4 * c:6)"
