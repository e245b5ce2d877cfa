"""Rules of ops with and without weights: the groups that each leaves free, and that removing them is exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxprune
from fxprune.discovery.explain import explain, frozen_axes
from fxprune.rules import registry
from tests.oracle import Net, axes_of, check_removes_exactly, discover, graph_of, groups_of, shape_of
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


def pairs(h: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)))


def back(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z).flatten(-2)


# name: (function, width after it, sizes of the groups that may be removed)
MIDDLES: dict[str, tuple[Middle, int, list[int]]] = {
    # ops that move axes
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
    # ops that change values
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
    # complex numbers
    "complex": (lambda h: back(pairs(h)), 12, [6]),
    "complex-turned": (lambda h: back(pairs(h) * torch.polar(torch.ones(6), torch.arange(6.0))), 12, [6]),
    "complex-of-a-cut": (lambda h: torch.cat((h[..., :6].exp(), back(pairs(h[..., 6:]))), -1), 12, [6, 3]),
    "complex-in-a-head": (lambda h: back(pairs(h.unflatten(-1, (3, 4)))).flatten(-2), 12, [3, 2]),
}


@pytest.mark.parametrize("name", tiers(MIDDLES, *list(MIDDLES)[::3]))
def test_ops_between_linear_layers(name: str) -> None:
    middle, width, groups = MIDDLES[name]
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


def test_a_product_with_an_imaginary_number_is_not_zero() -> None:

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(torch.zeros(12), torch.ones(12)) * torch.exp(m.a(x))
        return m.b(z.imag.sum(-1, keepdim=True).expand(2, 7, 5))  # type: ignore[no-any-return]

    dense = check_removes_exactly(Net(body, a=nn.Linear(10, 12), b=nn.Linear(5, 9)), {"x": torch.randn(2, 7, 10)})
    group = next(group for group in groups_of(dense) if group.size == 12)
    assert group.renormalised == ("sum_1",)


def test_rotary_pairs_are_units_of_the_frequencies() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        turns = torch.outer(torch.arange(x.shape[1]).float(), m.frequencies)
        by = torch.polar(torch.ones_like(turns), turns)[:, None]
        q, k = (back(pairs(part(x).unflatten(-1, (3, 8))) * by).transpose(1, 2) for part in (m.q, m.k))
        return m.b((q @ k.mT).softmax(-1).sum(1))  # type: ignore[no-any-return]

    parts = {"q": nn.Linear(10, 24), "k": nn.Linear(10, 24), "b": nn.Linear(7, 9)}
    dense = discover(Net(body, **parts, frequencies=torch.rand(4)), {"x": torch.randn(2, 7, 10)})
    assert shape_of(dense, "q.weight") == ["(a:3 * b:4 * c:2)", "d:10"]
    heads, turned, parts_of_one = axes_of(dense).tensors["q.weight"][0].parts  # type: ignore[union-attr]
    assert axes_of(dense).tensors["frequencies"] == (turned,)
    assert axes_of(dense).frozen[parts_of_one].reason == "the real and the imaginary part of a number"
    assert heads not in axes_of(dense).frozen


def test_the_input_of_view_as_complex_is_copied() -> None:
    dense = discover(*between(lambda h: back(pairs(h)), 12))
    viewed = [node for node in dense.graph.nodes if node.target is torch.ops.aten.view_as_complex.default]
    sources = [node.args[0] for node in viewed]
    assert sources and all(isinstance(node, fx.Node) for node in sources)
    assert {node.target for node in sources} == {torch.ops.aten.clone.default}


@pytest.mark.parametrize(
    "middle",
    [lambda h: h * h.nonzero().shape[0], lambda h: h[h[..., 0] > 0], lambda h: h + h[h > 0].sum()],
    ids=["scalar", "rows", "mask"],
)
def test_discovery_survives_sizes_of_the_data(middle: Middle) -> None:
    assert {group.size for group in groups_of(discover(*between(middle)))} <= {12}


def test_a_rule_that_fails_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    assert [group.size for group in groups_of(discover(*between(torch.erf)))] == [12]

    @fxprune.rule("erf")
    def broken(op: fxprune.OpSite) -> None:
        raise IndexError("no such axis")

    dense = discover(*between(torch.erf))
    assert groups_of(dense) == () and "aten.erf.default" in axes_of(dense).unruled.values()


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
