"""Code that asks for sizes: branches, ranges, remainders, equal sizes, loops and numbers made of sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.check import WIDTH, Between, Middle, numbers, outcome
from tests.tiers import tiers

TRACED = (2, 7)
OTHERS = ((1, 7), (2, 1), (1, 1), (3, 5), (5, 8), (2, 12), (4, 13), (7, 7), (2, 14), (3, 16), (2, 24))


def must_be_short(m: Any, h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] > 16:
        raise ValueError("too long")
    return h * 2


def asserts(m: Any, h: torch.Tensor) -> torch.Tensor:
    assert h.shape[1] <= 16
    return h * 2


def counts(m: Any, h: torch.Tensor) -> torch.Tensor:
    total = h.new_zeros(())
    for i in range(h.shape[1]):
        total = total + h[:, i].sum() * i
    return h + total


def padded(m: Any, h: torch.Tensor) -> torch.Tensor:
    missing = -h.shape[1] % 8
    return F.pad(h, (0, 0, 0, missing)).cumsum(1)[:, : h.shape[1]]


def in_chunks(m: Any, h: torch.Tensor) -> torch.Tensor:
    return torch.cat([part - part.mean(1, keepdim=True) for part in h.split(4, 1)], 1)


def in_half(m: Any, h: torch.Tensor) -> torch.Tensor:
    return torch.cat([part - part.mean(1, keepdim=True) for part in h.split(max(h.shape[1] // 2, 1), 1)], 1)


def three_ways(m: Any, h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] < 4:
        return h
    return h * 2 if h.shape[1] < 10 else h * 3


def by_length(name: str) -> Middle:
    return lambda m, h: h * 2 if eval(name, {"b": h.shape[0], "t": h.shape[1], "math": math}) else h * 3


CONDITIONS = [
    "t > 7", "t >= 7", "t < 8", "t <= 7", "t != 13", "t == 7", "t % 2", "t % 7 == 0", "t % 4 == 3", "not t & 1",
    "t in (3, 5, 7)", "5 < t < 9", "b >= 2", "b == 1", "b > 1", "b != 3", "b % 2 == 0", "b < t", "b == t", "b * t > 20",
    "b * t == 14", "b + t > 9", "t // 4 == 1", "int(t ** .5) == 2", "math.log2(t) > 3", "t > 512", "t == 1", "t > 1",
    "b == 1 and t > 1", "t - b > 4",
]  # fmt: skip

MIDDLES: dict[str, Middle] = {
    **{condition: by_length(condition) for condition in CONDITIONS},
    "integer root": lambda m, h: h * int(h.shape[1] ** 0.5),
    "root": lambda m, h: h * h.shape[1] ** -0.5,
    "logarithm": lambda m, h: h * math.log(h.shape[1] + 1),
    "quotient": lambda m, h: h / h.shape[1],
    "half": lambda m, h: h * (h.shape[1] // 2),
    "rounded up": lambda m, h: h * math.ceil(h.shape[1] / 4),
    "smaller": lambda m, h: h * min(h.shape[1], 9),
    "larger": lambda m, h: h * max(h.shape[1], 9),
    "float": lambda m, h: h * float(h.shape[1]),
    "length": lambda m, h: h * len(h),
    "numel": lambda m, h: h * 2 if h.numel() > 100 else h,
    "too long": must_be_short,
    "assert": asserts,
    "loop": counts,
    "chunks": in_chunks,
    "two halves": in_half,
    "three ways": three_ways,
    "padded": padded,
    "first five": lambda m, h: h - h[:, :5].mean(1, keepdim=True),
    "last three": lambda m, h: h - h[:, -3:].mean(1, keepdim=True),
    "second half": lambda m, h: h - h[:, h.shape[1] // 2 :].mean(1, keepdim=True),
    "every other": lambda m, h: h[:, ::2],
    "without the last": lambda m, h: h[:, :-1],
    "pairs": lambda m, h: h[:, : h.shape[1] // 2 * 2].unflatten(1, (-1, 2)).sum(2),
    "unfolded": lambda m, h: h.unfold(1, 3, 1).mean(-1),
    "squeezed": lambda m, h: h + h[:, :1].squeeze(1).unsqueeze(1),
    "squeezed batch": lambda m, h: h.squeeze(0),
    "chunked in two": lambda m, h: torch.stack(h.chunk(2, 1)[:1])[0],
    "flat": lambda m, h: (h.reshape(-1, h.shape[-1]) * 2).reshape(h.shape),
    "turned": lambda m, h: (
        h.transpose(0, 1).reshape(h.shape[1], -1).cumsum(0).reshape(h.shape[1], h.shape[0], -1).mT.mT
    ),
    "positions": lambda m, h: h * torch.arange(h.shape[1])[:, None],
    "a window": lambda m, h: m.mask[: h.shape[1], : h.shape[1]] @ h,
    "a table": lambda m, h: h * m.table(torch.arange(h.shape[1])),
    "a table, cut": lambda m, h: h * m.table.weight[: h.shape[1]],
    "a remainder of a table": lambda m, h: h * m.table.weight[torch.arange(h.shape[1]) % 16],
    "pooled": lambda m, h: F.avg_pool1d(h.mT, 2).mT,
    "interpolated": lambda m, h: F.interpolate(h.mT, size=4).mT,
    "repeated": lambda m, h: h.repeat_interleave(2, 1),
    "outer": lambda m, h: (h @ h.mT).softmax(-1) @ h,
    "sorted": lambda m, h: h.sort(1).values,
    "best": lambda m, h: h.topk(min(3, h.shape[1]), 1).values,
}


@pytest.mark.parametrize("name", tiers(MIDDLES, *list(MIDDLES)[::6]))
def test_of_sizes(name: str) -> None:
    parts: dict[str, Any] = {}
    if name == "a window":
        parts["mask"] = numbers(16, 16)
    if "table" in name:
        parts["table"] = nn.Embedding(16, 1)
    module = Between(MIDDLES[name], **parts).eval()
    found = outcome(module, {"x": numbers(*TRACED, 4)}, [{"x": numbers(*sizes, 4)} for sizes in OTHERS])
    assert found in ("exact", "frozen") or "traced" in found or "size" in found, found


class Two(nn.Module):
    """Two inputs, perhaps of equal sizes."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.c, self.b = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, 3)."""
        return self.b(self.how(self.a(x), self.c(y)))  # type: ignore[no-any-return]


PAIRS: dict[str, Any] = {
    "same length or not": lambda x, y: x + y if x.shape[1] == y.shape[1] else x,
    "same shape or not": lambda x, y: x * y if x.shape == y.shape else x,
    "longer or not": lambda x, y: x if x.shape[1] > y.shape[1] else x + y.mean(1, keepdim=True),
    "broadcast": lambda x, y: x + y,
    "cross attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "side by side": lambda x, y: torch.cat((x, y), 1),
    "batch of one or not": lambda x, y: x + y if y.shape[0] == x.shape[0] else x + y[:1],
    "cut to the other": lambda x, y: x + y[:, : x.shape[1]] if y.shape[1] >= x.shape[1] else x,
}


@pytest.mark.parametrize("name", tiers(PAIRS, "longer or not", "broadcast"))
@pytest.mark.parametrize("second", [(2, 7), (2, 5)], ids=["alike", "apart"])
def test_of_two_inputs(name: str, second: tuple[int, int]) -> None:
    if second == (2, 5) and name == "broadcast":
        second = (2, 1)

    def at(x: tuple[int, int], y: tuple[int, int]) -> Mapping[str, torch.Tensor]:
        return {"x": numbers(*x, 4), "y": numbers(*y, 4)}

    others = [
        ((3, 5), (3, 5)),
        ((3, 5), (3, 9)),
        ((3, 9), (3, 5)),
        ((1, 7), (1, 7)),
        ((2, 7), (1, 7)),
        ((2, 5), (2, 1)),
    ]
    found = outcome(Two(PAIRS[name]).eval(), at((2, 7), second), [at(x, y) for x, y in others])
    assert found in ("exact", "frozen") or "traced" in found or "size" in found, found
