"""Images, token ids and weights of unusual kinds: convolutions in two directions, tables, complex numbers, strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracle import Net
from tests.probes.check import numbers, outcome
from tests.tiers import tiers

Parts = Callable[[], dict[str, Any]]
Row = tuple[Callable[[Any, torch.Tensor], Any], Parts]

PICTURE = {"x": numbers(2, 3, 8, 8)}
IDS = {"x": torch.arange(12).reshape(2, 6) * 5 % 11}
ROWS = {"x": numbers(2, 5, 4)}


def conv(*sizes: int, **options: Any) -> nn.Module:
    return nn.Conv2d(*sizes, **{"kernel_size": 3, "padding": 1, **options})


def two(**more: Callable[[], Any]) -> Parts:
    """A convolution to eight channels, one back to four, and more parts."""
    return lambda: {"a": conv(3, 8), "b": conv(8, 4), **{name: make() for name, make in more.items()}}


def linear(**sizes: tuple[int, int]) -> Parts:
    return lambda: {name: nn.Linear(*size) for name, size in sizes.items()}


def parameter(**values: torch.Tensor) -> Parts:
    return lambda: {name: nn.Parameter(value) for name, value in values.items()}


def residual(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    return m.b(h + m.norm(m.c(h)).relu())


def dense_block(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    h = torch.cat((h, m.c(h).relu()), 1)
    return m.d(torch.cat((h, h.flip(-1)), 1))


def unet(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x).relu()
    low = F.interpolate(m.c(F.max_pool2d(h, 2)).relu(), scale_factor=2)
    return m.d(torch.cat((h, low), 1))


def inception(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    return m.d(torch.cat((m.c(h).relu(), F.avg_pool2d(h, 3, 1, 1), m.e(h)), 1))


def gated(m: Any, x: torch.Tensor) -> Any:
    a, b = m.c(m.a(x)).chunk(2, 1)
    return m.b(a * b.sigmoid())


def patches(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x).flatten(2).mT
    return m.c(h.softmax(1) * h).relu().mean(1)


def windows(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
    return m.c(F.scaled_dot_product_attention(h, h, h))


def shuffled(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    return m.b(h)


def by_channel(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    return m.b(torch.stack([h[:, i] * (i + 1) for i in range(h.shape[1])], 1))


def modulated(m: Any, x: torch.Tensor) -> Any:
    style = m.c(x.mean((2, 3)))
    weight = m.b.weight[None] * style[:, None, :, None, None]
    weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-6).rsqrt()
    h = m.a(x)
    batch = h.shape[0]
    flat = F.conv2d(h.reshape(1, -1, 8, 8), weight.flatten(0, 1), padding=1, groups=batch)
    return flat.reshape(batch, -1, 8, 8)


def standardised(m: Any, x: torch.Tensor) -> Any:
    w = m.b.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
    return F.conv2d(m.a(x), w, padding=1)


PICTURES: dict[str, Row] = {
    "batch norm": (lambda m, x: m.b(m.n(m.a(x)).relu()), two(n=lambda: nn.BatchNorm2d(8))),
    "batch norm of the batch": (
        lambda m, x: m.b(m.n(m.a(x))), two(n=lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    ),
    "layer norm of channels": (
        lambda m, x: m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), two(n=lambda: nn.LayerNorm(8)),
    ),
    "response norm": (lambda m, x: m.b(m.n(m.a(x))), two(n=lambda: nn.LocalResponseNorm(3))),
    "grouped": (lambda m, x: m.b(m.c(m.a(x))), two(c=lambda: conv(8, 8, groups=2))),
    "dilated": (lambda m, x: m.b(m.c(m.a(x))), two(c=lambda: conv(8, 8, dilation=2, padding=2))),
    "reflected": (lambda m, x: m.b(m.c(m.a(x))), two(c=lambda: conv(8, 8, padding_mode="reflect"))),
    "transposed": (lambda m, x: m.b(m.c(m.a(x))), two(c=lambda: nn.ConvTranspose2d(8, 8, 2, 2))),
    "shuffled by hand": (shuffled, two()),
    "flattened": (lambda m, x: m.c(m.a(x).flatten(1)), two(c=lambda: nn.Linear(512, 3))),
    "flattened the other way": (
        lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).flatten(1)),
        two(c=lambda: nn.Linear(512, 3)),
    ),
    "pooled and flattened": (
        lambda m, x: m.c(F.adaptive_avg_pool2d(m.a(x), 2).flatten(1)), two(c=lambda: nn.Linear(32, 3)),
    ),
    "pooled over channels": (lambda m, x: m.a(x).amax(1), two()),
    "mean of channels": (lambda m, x: m.b(m.a(x) - m.a(x).mean(1, keepdim=True)), two()),
    "folded": (lambda m, x: m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (8, 8), 2, stride=2)), two()),
    "residual": (residual, two(c=lambda: conv(8, 8), norm=lambda: nn.BatchNorm2d(8))),
    "dense": (dense_block, lambda: {"a": conv(3, 4), "c": conv(4, 6), "d": conv(20, 3)}),
    "encoder and decoder": (unet, lambda: {"a": conv(3, 6), "c": conv(6, 5), "d": conv(11, 3)}),
    "inception": (inception, lambda: {"a": conv(3, 6), "c": conv(6, 5), "e": conv(6, 4), "d": conv(15, 3)}),
    "gated": (gated, two(c=lambda: conv(8, 16))),
    "patches": (patches, two(c=lambda: nn.Linear(8, 3))),
    "windows": (windows, two(c=lambda: nn.Linear(8, 3))),
    "channel by channel": (by_channel, two()),
    "modulated": (modulated, two(c=lambda: nn.Linear(3, 8))),
    "standardised": (standardised, two()),
    "volume": (
        lambda m, x: m.d(m.c(m.a(x)[:, None]).relu().flatten(1, 2)),
        two(c=lambda: nn.Conv3d(1, 2, 3, padding=1), d=lambda: conv(16, 3)),
    ),
    "one column": (lambda m, x: m.b(m.c(m.a(x).flatten(2)).view(-1, 8, 8, 8)), two(c=lambda: nn.Conv1d(8, 8, 1))),
    "cropped": (lambda m, x: m.b(m.a(x)[..., 1:-1, 1:-1] * F.pad(m.a(x), (0, 0, -1, -1))[..., 1:-1]), two()),
    "cut channels": (lambda m, x: m.c(m.a(x)[:, 2:6]), two(c=lambda: conv(4, 3))),
    "weights cut": (lambda m, x: F.conv2d(m.a(x)[:, :6], m.b.weight[:, 2:], padding=1), two()),
    "grid sample": (
        lambda m, x: m.b(F.grid_sample(m.a(x), m.g.tanh().expand(x.shape[0], -1, -1, -1), align_corners=False)),
        two(g=lambda: nn.Parameter(numbers(1, 8, 8, 2))),
    ),
}  # fmt: skip


def embedding(rows: int = 11, width: int = 8, **options: Any) -> nn.Module:
    return nn.Embedding(rows, width, **options)


def words(**more: Callable[[], Any]) -> Parts:
    return lambda: {"e": embedding(), "b": nn.Linear(8, 3), **{name: make() for name, make in more.items()}}


def masked_mean(m: Any, x: torch.Tensor) -> Any:
    mask = (x > 3).float()[..., None]
    return m.b((m.e(x) * mask).sum(1) / mask.sum(1).clamp_min(1))


def looked_up_twice(m: Any, x: torch.Tensor) -> Any:
    h = m.e(x)
    best = (h @ m.e.weight.mT).argmax(-1)
    return m.b(h + m.e(best))


def two_tables(m: Any, x: torch.Tensor) -> Any:
    low = m.p(x.clamp(max=4))
    return m.b(torch.where((x < 5)[..., None], low, m.e(x)))


def factorised(m: Any, x: torch.Tensor) -> Any:
    h = m.up(m.small(x))
    return (m.b(h).relu() @ m.b.weight @ m.up.weight) @ m.small.weight.mT


def recurrent(m: Any, x: torch.Tensor) -> Any:
    return m.b(m.net(m.e(x))[0])


TABLES: dict[str, Row] = {
    "table": (lambda m, x: m.b(m.e(x)), words()),
    "bounded": (lambda m, x: m.b(m.e(x)), words(e=lambda: embedding(max_norm=0.5))),
    "tied": (lambda m, x: F.linear(m.c(m.e(x)).relu(), m.e.weight), words(c=lambda: nn.Linear(8, 8))),
    "tied and scaled": (
        lambda m, x: F.linear(m.e(x) * 8**0.5, m.e.weight / 3, m.v),
        words(v=lambda: nn.Parameter(numbers(11))),
    ),
    "one hot": (lambda m, x: m.b(F.one_hot(x, 11).float() @ m.e.weight), words()),
    "masked mean": (masked_mean, words()),
    "positions counted": (lambda m, x: m.b(m.e(x) + m.p((x > 2).long().cumsum(1))), words(p=lambda: embedding(7))),
    "looked up twice": (looked_up_twice, words()),
    "hashed": (lambda m, x: m.b(m.e(x) + sum(m.p((x * i + 1) % 5) for i in (3, 7))), words(p=lambda: embedding(5))),
    "two tables": (two_tables, words(p=lambda: embedding(5))),
    "joined tables": (
        lambda m, x: m.b(F.embedding(x, torch.cat((m.p.weight, m.e.weight)))), words(p=lambda: embedding(5)),
    ),
    "factorised": (
        factorised,
        lambda: {"small": embedding(11, 3), "up": nn.Linear(3, 8, bias=False), "b": nn.Linear(8, 8)},
    ),
    "bag": (lambda m, x: m.b(m.g(x)), words(g=lambda: nn.EmbeddingBag(11, 8, mode="mean"))),
    "bag of sums": (lambda m, x: m.b(m.g(x)), words(g=lambda: nn.EmbeddingBag(11, 8, mode="sum", padding_idx=0))),
    "gru of two": (recurrent, words(net=lambda: nn.GRU(8, 8, 2, batch_first=True))),
    "projected lstm": (recurrent, words(net=lambda: nn.LSTM(8, 10, proj_size=8, batch_first=True))),
    "row by its own number": (lambda m, x: m.b(m.e.weight[x[:, 0]] + m.e(x).mean(1)), words()),
    "scattered": (lambda m, x: m.b(torch.zeros(x.shape[0], 11).scatter(1, x, 1.0) @ m.e.weight), words()),
    "sums by word": (lambda m, x: m.b(torch.zeros(11, 8).index_add(0, x.flatten(), m.e(x).flatten(0, 1))), words()),
}  # fmt: skip


class Complex(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.complex(numbers(out, width), numbers(out, width).cos()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.mT


def parts_of_complex(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    return m.b(torch.cat((m.c(torch.complex(h, h * 0)).real, h), -1))


def turned_by_complex(m: Any, x: torch.Tensor) -> Any:
    h = torch.view_as_complex(m.a(x).unflatten(-1, (4, 2)))
    return m.b(torch.view_as_real(h * m.p.to(torch.complex64)).flatten(-2))


def holding(tensor: torch.Tensor, **sizes: tuple[int, int]) -> Parts:
    return lambda: {"p": tensor.clone(), **{name: nn.Linear(*size) for name, size in sizes.items()}}


def trained(tensor: torch.Tensor) -> Parts:
    return lambda: {"p": nn.Parameter(tensor.detach()), **linear(**AB)()}


AB = {"a": (4, 8), "b": (8, 3)}
SELECT = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])

WEIGHTS: dict[str, Row] = {
    "complex": (parts_of_complex, lambda: {"a": nn.Linear(4, 8), "b": nn.Linear(16, 3), "c": Complex(8, 8)}),
    "complex, next": (
        lambda m, x: m.c(torch.complex(m.a(x), m.d(x))).abs(),
        lambda: {"a": nn.Linear(4, 8), "d": nn.Linear(4, 8), "c": Complex(8, 3)},
    ),
    "turned by complex": (turned_by_complex, trained(numbers(4))),
    "in integers": (lambda m, x: m.b(m.a(x) * m.p), holding(torch.arange(8), **AB)),
    "in booleans": (lambda m, x: m.b(m.a(x) * m.p), holding(torch.arange(8) % 3 > 0, **AB)),
    "mask by number": (lambda m, x: m.b(m.a(x).masked_fill(m.p == 0, 0.0)), holding(torch.arange(8) % 2, **AB)),
    "mask to one": (lambda m, x: m.b(m.a(x).masked_fill(m.p == 0, 1.0)), holding(torch.arange(8) % 2, **AB)),
    "order in a buffer": (lambda m, x: m.b(m.a(x)[..., m.p]), holding(SELECT, **AB)),
    "order by gather": (lambda m, x: m.b(m.a(x).gather(-1, m.p.expand_as(m.a(x)))), holding(SELECT, **AB)),
    "order of the weights": (lambda m, x: F.linear(m.a(x), m.b.weight[:, m.p]), holding(SELECT, **AB)),
    "order of both": (lambda m, x: F.linear(m.a(x)[..., m.p], m.b.weight[:, m.p]), holding(SELECT, **AB)),
    "groups in a buffer": (
        lambda m, x: m.b(m.a(x).new_zeros(*x.shape[:2], 3).index_add(-1, m.p, m.a(x)).repeat(1, 1, 3)[..., :8]),
        holding(torch.arange(8) % 3, **AB),
    ),
    "scale of the weights": (lambda m, x: F.linear(m.a(x), m.b.weight * m.p), holding(numbers(8), **AB)),
    "mask of the weights": (
        lambda m, x: m.b(F.linear(x, m.a.weight * (m.p > 0), m.a.bias)),
        holding(numbers(8, 4), **AB),
    ),
    "weights in int8": (
        lambda m, x: m.b(F.linear(x, m.p.float() * m.s)),
        lambda: {**linear(**AB)(), "p": (numbers(8, 4) * 9).to(torch.int8), "s": nn.Parameter(numbers(8, 1))},
    ),
    "weights by a table": (
        lambda m, x: m.b(F.linear(x, m.t[m.p])),
        lambda: {**linear(**AB)(), "p": torch.arange(32).view(8, 4) % 7, "t": nn.Parameter(numbers(7))},
    ),
    "expanded": (lambda m, x: m.b(m.a(x) * m.p.expand(8)), trained(numbers(1))),
    "stride of zero": (lambda m, x: m.b(m.a(x) * m.p), holding(numbers(1), **AB)),
    "turned weight": (lambda m, x: m.b(x @ m.p), trained(numbers(8, 4).mT)),
    "a cut of a larger one": (lambda m, x: m.b(F.linear(x, m.p)), trained(numbers(16, 4)[::2])),
    "a number": (lambda m, x: m.b(m.a(x) * m.p), trained(torch.tensor(2.0))),
    "empty": (lambda m, x: m.b(torch.cat((m.a(x), F.linear(x, m.p)), -1)), trained(numbers(0, 4))),
    "of one unit": (lambda m, x: m.b(m.a(x)), linear(a=(4, 1), b=(1, 3))),
    "not trained": (
        lambda m, x: m.b(m.a(x).relu()),
        lambda: {k: v.requires_grad_(False) for k, v in linear(**AB)().items()},
    ),
    "several axes": (
        lambda m, x: torch.einsum("btd,dijk,ijko->bto", x, m.p, m.q),
        parameter(p=numbers(4, 2, 3, 2), q=numbers(2, 3, 2, 3)),
    ),
    "two products of one": (lambda m, x: m.b(m.a(x)) + m.b(m.a(x.flip(1)).relu()), linear(**AB)),
    "all zero": (lambda m, x: m.b(m.a(x)), lambda: {k: _zeroed(v) for k, v in linear(**AB)().items()}),
    "very large": (lambda m, x: m.b(m.a(x) * 1e18) * 1e-18, linear(**AB)),
}  # fmt: skip


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


ALL = {
    **{name: (PICTURE, *row) for name, row in PICTURES.items()},
    **{name: (IDS, *row) for name, row in TABLES.items()},
    **{f"weight, {name}": (ROWS, *row) for name, row in WEIGHTS.items()},
}


FROZEN = {
    "layer norm of channels", "response norm", "pooled over channels", "mean of channels", "channel by channel",
    "standardised", "grid sample", "projected lstm", "bounded",
    "weight, order in a buffer", "weight, order by gather", "weight, of one unit", "weight, order of the weights",
    "weight, order of both", "weight, weights by a table",
}  # fmt: skip
"""The graph is the module, and no unit can go."""

REFUSED = {
    "weight, complex": "Keep real and imaginary parts as two parameters",
    "weight, complex, next": "Keep real and imaginary parts as two parameters",
}

SOME = (
    "batch norm",
    "grouped",
    "encoder and decoder",
    "tied",
    "joined tables",
    "weight, in integers",
    "weight, complex",
)


@pytest.mark.parametrize("name", tiers(ALL, *SOME[::3]))
def test_of_inputs(name: str) -> None:
    inputs, body, parts = ALL[name]
    torch.manual_seed(0)
    found = outcome(Net(body, **parts()).eval(), inputs, every=True, dynamic=name in SOME)
    assert REFUSED[name] in found if name in REFUSED else found == ("frozen" if name in FROZEN else "exact"), found
