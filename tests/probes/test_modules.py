"""Weights used twice, turned or cut; convolutions and recurrent cells; units that are moved about or counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize

from tests.oracle import Net
from tests.probes.check import WIDTH, Between, Middle, numbers, outcome
from tests.tiers import tiers

Parts = Callable[[], dict[str, Any]]

X = {"x": numbers(2, 5, 4)}
OTHERS = ({"x": numbers(3, 8, 4)},)


def linear(*names: str, width: int = WIDTH, out: int = WIDTH, bias: bool = True) -> Parts:
    return lambda: {name: nn.Linear(width, out, bias) for name in names}


def two(out: int, back: int | None = None) -> Parts:
    """A layer ``c`` to some units, and one ``d`` back from as many, or from others."""
    return lambda: {"c": nn.Linear(WIDTH, out), "d": nn.Linear(back or out, WIDTH)}


def weight(*shape: int) -> Parts:
    return lambda: {"p": nn.Parameter(numbers(*shape))}


class Doubled(nn.Module):
    """A parametrization by twice the weight, antisymmetric."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu(1) - x.triu(1).mT


class Squashed(nn.Module):
    """A parametrization row by row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


def parametrized(kind: nn.Module) -> Parts:
    def parts() -> dict[str, Any]:
        layer = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(layer, "weight", kind)
        return {"c": layer}

    return parts


def orthogonal() -> dict[str, Any]:
    return {"c": parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))}


def nest() -> Net:
    """Modules by name and number."""
    up = nn.ModuleList([nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)])
    body = lambda m, h: m.by["down"](sum(layer(h).relu() for layer in m.by["up"]))  # noqa: E731
    return Net(body, by=nn.ModuleDict({"up": up, "down": nn.Linear(8, 6)}))


def shared() -> Net:
    """A layer that two others hold."""
    layer = nn.Linear(WIDTH, WIDTH)
    return Net(lambda m, h: m.two(m.one(h)), one=nn.Sequential(layer, nn.ReLU()), two=nn.Sequential(nn.Tanh(), layer))


def tied_transposed() -> dict[str, Any]:
    return {"c": nn.Linear(WIDTH, 8, bias=False)}


def into(m: Any, h: torch.Tensor) -> Any:
    out = torch.empty_like(h)
    torch.mul(h, 2, out=out)
    return out


def written_by_slices(m: Any, h: torch.Tensor) -> Any:
    out = h.new_zeros(*h.shape[:-1], 6)
    out[..., 3:] = h[..., :3]
    out[..., :3] = h[..., 3:]
    return out


def written_in_turn(m: Any, h: torch.Tensor) -> Any:
    out = h.new_empty(h.shape)
    for i in range(6):
        out[..., 5 - i] = h[..., i]
    return out


def scaled_in_turn(m: Any, h: torch.Tensor) -> Any:
    h = h.clone()
    for i, column in enumerate(h.unbind(-1)):
        column.mul_(i + 1)
    return h


def loops_by_values(m: Any, h: torch.Tensor) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda v: v.abs().sum() > 1, lambda v: (m.c(v) * 0.1,), (h,))[0]


def flexible(m: Any, h: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    x = h.unflatten(-1, (3, 2)).transpose(1, 2)
    return flex_attention(x, x, x).transpose(1, 2).flatten(-2)  # type: ignore[union-attr]


def recurrence(m: Any, h: torch.Tensor) -> Any:
    state = h.new_zeros(h.shape[0], 8)
    for t in range(5):
        state = m.cell(h[:, t], state)
    return m.c(state)[:, None].expand(-1, 5, -1)


def lstm_cell(m: Any, h: torch.Tensor) -> Any:
    state = h.new_zeros(h.shape[0], 8), h.new_zeros(h.shape[0], 8)
    for t in range(3):
        state = m.cell(h[:, t], state)
    return m.c(state[0])[:, None].expand(-1, 5, -1)


def gates_by_hand(m: Any, h: torch.Tensor) -> Any:
    i, f, g, o = m.c(h).chunk(4, -1)
    return m.d(o.sigmoid() * ((i.sigmoid() * g.tanh()).cumsum(1) * f.sigmoid()).tanh())


def uneven_gates(m: Any, h: torch.Tensor) -> Any:
    a, b, c = m.c(h).split([8, 16, 8], -1)
    return m.d(a * b[..., ::2] + c * b[..., 1::2])


def overlapping(m: Any, h: torch.Tensor) -> Any:
    v = m.c(h)
    return m.d(v[..., :8] * v[..., 4:12])


def halves_of_weights(m: Any, h: torch.Tensor) -> Any:
    up, gate = m.c.weight.chunk(2)
    return F.linear(F.linear(h, up) * F.linear(h, gate).sigmoid(), m.d.weight)


def strips(m: Any, h: torch.Tensor) -> Any:
    return F.linear(F.linear(h, m.c.weight[::2]).relu(), m.d.weight[:, 1::2])


def heads_of_weights(m: Any, h: torch.Tensor) -> Any:
    return torch.einsum("btd,hdk,hke->bte", h, m.c.weight.view(4, 8, WIDTH).mT, m.d.weight.T.view(4, 8, WIDTH))


def fused_for_speed(m: Any, h: torch.Tensor) -> Any:
    both = torch.cat((m.c.weight, m.d.weight))
    a, b = F.linear(h, both).split([WIDTH, WIDTH], -1)
    return a * b.sigmoid()


def low_rank(m: Any, h: torch.Tensor) -> Any:
    return m.c(h) + m.e(m.d(h)) * 0.5


def standardised(m: Any, h: torch.Tensor) -> Any:
    w = m.c.weight
    return F.linear(h, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3))


def standardised_over_rows(m: Any, h: torch.Tensor) -> Any:
    w = m.c.weight
    return F.linear(h, (w - w.mean(0)) / (w.std(0) + 1e-3)).relu()


def ternary(m: Any, h: torch.Tensor) -> Any:
    w = m.c.weight
    scale = w.abs().mean()
    return F.linear(h, (w / scale).round().clamp(-1, 1) * scale)


def by_row_scales(m: Any, h: torch.Tensor) -> Any:
    w = m.c.weight
    scale = w.abs().amax(1, keepdim=True) / 127
    return F.linear(h, (w / scale.clamp_min(1e-8)).round() * scale)


def by_token_scales(m: Any, h: torch.Tensor) -> Any:
    scale = h.abs().amax(-1, keepdim=True) / 127
    return m.c((h / scale).round() * scale)


def hyper(m: Any, h: torch.Tensor) -> Any:
    made = m.c(h.mean(1)).view(-1, WIDTH, WIDTH)
    return torch.bmm(h, made.tanh())


def memory(m: Any, h: torch.Tensor) -> Any:
    keys = m.c.weight
    return (h @ keys.mT).relu() @ m.d.weight.mT


def memory_by_softmax(m: Any, h: torch.Tensor) -> Any:
    return (h @ m.c.weight.mT).softmax(-1) @ m.d.weight.mT


def nearest(m: Any, h: torch.Tensor) -> Any:
    codes = torch.cdist(h, m.c.weight).argmin(-1)
    return m.c.weight[codes]


def best_units(m: Any, h: torch.Tensor) -> Any:
    v = m.c(h).relu()
    return m.d(v * (v >= v.topk(3, -1).values[..., -1:]))


def switched(m: Any, h: torch.Tensor) -> Any:
    which = m.c(h).argmax(-1, keepdim=True)
    return torch.where(which == 0, m.d(h), h)


def turned_in_plane(m: Any, h: torch.Tensor) -> Any:
    z = torch.complex(h[..., :3], h[..., 3:]) * torch.polar(torch.ones(3), torch.arange(3.0))
    return torch.cat((z.real, z.imag), -1)


def loop_over_layers(m: Any, h: torch.Tensor) -> Any:
    for _ in range(3):
        h = h + m.d(m.c(h).relu())
    return h


def layers_in_other_places(m: Any, h: torch.Tensor) -> Any:
    return m.d(m.c(h).relu()) + m.d(m.c(h * 2).sigmoid()) * m.d(m.c(h.flip(1)))


def strided(m: Any, h: torch.Tensor) -> Any:
    w = m.c.weight
    return F.linear(h, w.as_strided((3, 6), (12, 1)), None).repeat(1, 1, 2)


def covariance(m: Any, h: torch.Tensor) -> Any:
    c = h - h.mean(1, keepdim=True)
    return h @ (c.mT @ c / h.shape[1]).softmax(-1)


def maxout_of_positive(m: Any, h: torch.Tensor) -> Any:
    return m.d(m.c(h).relu().unflatten(-1, (8, 4)).amax(-1))


MIDDLES: dict[str, tuple[Middle, Parts]] = {
    # weights in several places
    "tied, turned": (lambda m, h: F.linear(m.c(h).relu(), m.c.weight.T), tied_transposed),
    "tied, three times": (lambda m, h: m.c(m.c(m.c(h).relu()).relu()), linear("c")),
    "tied with the first": (lambda m, h: h + F.linear(F.linear(h, m.a.weight.T), m.a.weight), dict),
    "tied with the last": (lambda m, h: F.linear(m.b(h), m.b.weight.T), dict),
    "symmetric": (lambda m, h: F.linear(h, m.c.weight + m.c.weight.T), linear("c")),
    "squared": (lambda m, h: F.linear(h, m.c.weight @ m.c.weight), linear("c")),
    "inverse": (lambda m, h: h @ torch.linalg.inv(m.c.weight + 4 * torch.eye(WIDTH)), linear("c")),
    "matrix exponential": (lambda m, h: h @ torch.matrix_exp(m.c.weight), linear("c")),
    "halves of weights": (halves_of_weights, two(16, 8)),
    "strips of weights": (strips, two(16)),
    "heads of weights": (heads_of_weights, two(32)),
    "fused": (fused_for_speed, linear("c", "d")),
    "product of weights": (lambda m, h: F.linear(h, m.d.weight @ m.c.weight), two(8)),
    "low rank": (low_rank, lambda: {"c": nn.Linear(6, 6), "d": nn.Linear(6, 2, False), "e": nn.Linear(2, 6, False)}),
    "bias of another": (lambda m, h: F.linear(h, m.c.weight, m.d.bias).relu() + m.d(h), linear("c", "d")),
    "weight as input": (lambda m, h: h + m.d(m.c.weight.relu()).mean(0), linear("c", "d")),
    "standardised": (standardised, linear("c")),
    "standardised over rows": (standardised_over_rows, linear("c")),
    "ternary": (ternary, linear("c")),
    "row scales": (by_row_scales, linear("c")),
    "token scales": (by_token_scales, linear("c")),
    "strides": (strided, linear("c")),
    "row as bias": (lambda m, h: h + m.c.weight[0], linear("c")),
    "column as scale": (lambda m, h: h * m.c.weight[:, 2], linear("c")),
    "diagonal": (lambda m, h: h * m.c.weight.diagonal() + m.c(h), linear("c")),
    "bias as index": (lambda m, h: h[..., m.c.bias.argsort()], linear("c")),
    "weight as table": (lambda m, h: h + F.embedding(torch.arange(h.shape[1]) % 4, m.c.weight), linear("c")),
    "bias as scale": (lambda m, h: m.c(h) * m.c.bias, linear("c")),
    "size of a weight": (lambda m, h: m.d(m.c(h).relu() / m.c.out_features**0.5), two(8)),
    "norm of a weight": (lambda m, h: h / m.c.weight.norm() + m.c(h), linear("c")),
    "made of inputs": (hyper, linear("c", out=WIDTH * WIDTH)),
    "memory": (memory, two(8)),
    "memory by softmax": (memory_by_softmax, two(8)),
    "nearest code": (nearest, lambda: {"c": nn.Linear(WIDTH, 8)}),
    # parametrizations, nesting, calls
    "antisymmetric": (lambda m, h: m.c(h), parametrized(Doubled())),
    "squashed": (lambda m, h: m.c(h), parametrized(Squashed())),
    "orthogonal": (lambda m, h: m.c(h), orthogonal),
    "nested": (lambda m, h: m.c(h), lambda: {"c": nest()}),
    "shared": (lambda m, h: m.c(h), lambda: {"c": shared()}),
    "functional call": (
        lambda m, h: functional_call(m.c, {"weight": m.c.weight * 2, "bias": m.d.bias}, (h,)), linear("c", "d"),
    ),
    "mapped": (lambda m, h: vmap(m.c)(h), linear("c")),
    "condition on a size": (
        lambda m, h: torch.cond(h.shape[1] > 3, lambda v: m.c(v).relu(), lambda v: m.d(v), (h,)), linear("c", "d"),
    ),
    "condition on values": (
        lambda m, h: torch.cond(h.sum() > 0, lambda v: m.c(v).relu(), lambda v: m.d(v), (h,)), linear("c", "d"),
    ),
    "branch on values": (lambda m, h: m.c(h) if h.sum() > 0 else m.d(h), linear("c", "d")),
    "while": (loops_by_values, linear("c")),
    "gradient of a function": (lambda m, h: h + torch.func.grad(lambda v: m.c(v).square().sum())(h), linear("c")),
    "tangent": (lambda m, h: torch.func.jvp(m.c, (h,), (h.cos(),))[1], linear("c")),
    "flex attention": (flexible, dict),
    "loop over layers": (loop_over_layers, two(8)),
    "layers in other places": (layers_in_other_places, two(8)),
    "one and the other": (lambda m, h: m.d(m.c(h).relu()) + m.c(m.d(h).relu()), linear("c", "d")),
    # cells and gates
    "cell": (recurrence, lambda: {"cell": nn.RNNCell(6, 8), "c": nn.Linear(8, 6)}),
    "gru cell": (recurrence, lambda: {"cell": nn.GRUCell(6, 8), "c": nn.Linear(8, 6)}),
    "lstm cell": (lstm_cell, lambda: {"cell": nn.LSTMCell(6, 8), "c": nn.Linear(8, 6)}),
    "gru": (lambda m, h: m.c(m.net(h)[0]), lambda: {"net": nn.GRU(6, 8, batch_first=True), "c": nn.Linear(8, 6)}),
    "lstm": (lambda m, h: m.c(m.net(h)[0]), lambda: {"net": nn.LSTM(6, 8, batch_first=True), "c": nn.Linear(8, 6)}),
    "lstm, both ways": (
        lambda m, h: m.c(m.net(h)[0]),
        lambda: {"net": nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True), "c": nn.Linear(8, 6)},
    ),
    "rnn": (lambda m, h: m.c(m.net(h)[0]), lambda: {"net": nn.RNN(6, 8, batch_first=True), "c": nn.Linear(8, 6)}),
    "gates by hand": (gates_by_hand, two(32, 8)),
    "uneven gates": (uneven_gates, two(32, 8)),
    "overlapping": (overlapping, two(12, 8)),
    "maxout": (lambda m, h: m.c(h).unflatten(-1, (8, 4)).amax(-1)[..., :6], linear("c", out=32)),
    "maxout, next": (lambda m, h: m.d(m.c(h).unflatten(-1, (8, 4)).amax(-1)), two(32, 8)),
    "maxout of what is positive": (maxout_of_positive, two(32, 8)),
    "maxout across": (lambda m, h: m.d(m.c(h).unflatten(-1, (4, 8)).amax(-2)), two(32, 8)),
    "best units": (best_units, two(8)),
    "switched": (switched, two(8, 6)),
    # units moved about, counted, mixed
    "out=": (into, dict),
    "written by slices": (written_by_slices, dict),
    "written in turn": (written_in_turn, dict),
    "scaled in turn": (scaled_in_turn, dict),
    "unit by unit": (lambda m, h: torch.stack([h[..., i] * (i + 1) for i in range(h.shape[-1])], -1), dict),
    "swapped": (lambda m, h: h[..., torch.tensor([5, 0, 1, 2, 3, 4])], dict),
    "order": (lambda m, h: h.gather(-1, h.argsort(-1).argsort(-1)), dict),
    "running sum": (lambda m, h: h.cumsum(-1), dict),
    "neighbours' response": (lambda m, h: F.local_response_norm(h.mT, 3).mT, dict),
    "shuffled channels": (lambda m, h: h.unflatten(-1, (2, 3)).mT.flatten(-2), dict),
    "shuffled by op": (lambda m, h: F.channel_shuffle(h.mT[..., None], 2)[..., 0].mT, dict),
    "counted nonzero": (lambda m, h: h / (h != 0).sum(-1, keepdim=True).clamp_min(1), dict),
    "covariance": (covariance, dict),
    "first nonzero": (lambda m, h: h * (h > 0).int().argmax(-1, keepdim=True), dict),
    "fourier of tokens": (lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 2, n=h.shape[1], dim=1), dict),
    "fourier of units": (lambda m, h: torch.fft.fft(h, dim=-1).real, dict),
    "complex plane": (turned_in_plane, dict),
    "row of weights": (lambda m, h: h @ m.p @ m.p.T, weight(WIDTH, 1)),
    "bilinear": (lambda m, h: m.c(h, h), lambda: {"c": nn.Bilinear(6, 6, 6)}),
    "softmax of gates": (lambda m, h: h * h.softmax(-1), dict),
    "dropped channels": (lambda m, h: F.dropout1d(h.mT, 0.5, m.training).mT, dict),
    "sparsemax": (lambda m, h: (h - h.topk(2, -1).values[..., -1:]).relu(), dict),
    "sigmoid of a sum": (lambda m, h: h * h.sum(-1, keepdim=True).sigmoid(), dict),
    "squeeze and excite": (lambda m, h: h * m.d(m.c(h.mean(1, keepdim=True)).relu()).sigmoid(), two(2)),
    "attention over units": (lambda m, h: h @ (h.mT @ h).softmax(-1) @ m.p, weight(WIDTH, WIDTH)),
    "multiplied depthwise": (
        lambda m, h: m.d(m.c(h.mT).mT), lambda: {"c": nn.Conv1d(6, 12, 3, padding=1, groups=6), "d": nn.Linear(12, 6)},
    ),
    "conv over units": (
        lambda m, h: m.c(h.flatten(0, 1)[:, None])[:, 0].view_as(h), lambda: {"c": nn.Conv1d(1, 1, 3, padding=1)},
    ),
    "causal conv": (lambda m, h: F.conv1d(F.pad(h.mT, (2, 0)), m.p, groups=6).mT, weight(6, 1, 3)),
    "padded circularly": (
        lambda m, h: m.c(h.mT).mT, lambda: {"c": nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")},
    ),
    "transposed, grouped": (lambda m, h: m.c(h.mT).mT, lambda: {"c": nn.ConvTranspose1d(6, 6, 3, padding=1, groups=2)}),
    "transposed, depthwise": (
        lambda m, h: m.c(h.mT).mT, lambda: {"c": nn.ConvTranspose1d(6, 6, 3, padding=1, groups=6)},
    ),
    "conv and its transpose": (
        lambda m, h: F.conv_transpose1d(m.c(h.mT).relu(), m.c.weight, padding=1).mT,
        lambda: {"c": nn.Conv1d(6, 8, 3, padding=1)},
    ),
    "embedding of codes": (lambda m, h: h + m.c((h[..., 0] > 0).long()), lambda: {"c": nn.Embedding(2, 6)}),
    "embedding bag": (
        lambda m, h: h + m.c(torch.tensor([[0, 1], [2, 3]]))[:, None].mean(0), lambda: {"c": nn.EmbeddingBag(4, 6)},
    ),
    "multihead": (
        lambda m, h: m.c(h, h, h, need_weights=False)[0], lambda: {"c": nn.MultiheadAttention(6, 2, batch_first=True)},
    ),
    "multihead, other keys": (
        lambda m, h: m.c(h, h[..., :4], h[..., 1:5], need_weights=False)[0],
        lambda: {"c": nn.MultiheadAttention(6, 2, batch_first=True, kdim=4, vdim=4)},
    ),
    "multihead, more": (
        lambda m, h: m.c(h, h, h)[0],
        lambda: {"c": nn.MultiheadAttention(6, 3, batch_first=True, add_bias_kv=True, add_zero_attn=True)},
    ),
    "encoder layer": (lambda m, h: m.c(h), lambda: {"c": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)}),
    "encoder layer, norm first": (
        lambda m, h: m.c(h),
        lambda: {"c": nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, norm_first=True, activation="gelu")},
    ),
    "decoder layer": (lambda m, h: m.c(h, h * 2), lambda: {"c": nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)}),
}  # fmt: skip


FROZEN = {
    "inverse", "matrix exponential", "ternary", "bias as index", "nearest code", "antisymmetric", "written in turn",
    "unit by unit", "swapped", "order", "neighbours' response", "shuffled by op", "covariance", "first nonzero",
    "fourier of tokens", "fourier of units", "bilinear", "softmax of gates", "sparsemax", "conv over units",
    "embedding of codes",
}  # fmt: skip
"""The graph is the module, and no unit can go."""

REFUSED = {
    "mapped": "torch.func runs functions of its own",
    "tangent": "torch.func runs functions of its own",
    "condition on a size": "cond runs functions of its own",
    "condition on values": "cond runs functions of its own",
    "while": "while_loop runs functions of its own",
    "gradient of a function": "cannot be traced",
    "flex attention": "cannot be traced",
    "branch on values": "cannot be traced",
    "out=": "don't support automatic differentiation",
    "scaled in turn": "replace the inplace operation",
}
"""Words of the refusal of those that are not one graph."""

SOME = ("tied, turned", "fused", "nested", "maxout, next", "mapped", "condition on values", "shuffled channels")


@pytest.mark.parametrize("name", tiers(MIDDLES, *SOME[::2]))
def test_of_modules(name: str) -> None:
    middle, parts = MIDDLES[name]
    torch.manual_seed(0)
    module = Between(middle, **parts()).eval()
    dynamic = name in SOME or name in REFUSED
    found = outcome(module, X, OTHERS if dynamic else (), every=True, dynamic=dynamic)
    assert REFUSED[name] in found if name in REFUSED else found == ("frozen" if name in FROZEN else "exact"), found
