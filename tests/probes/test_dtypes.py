"""Code that asks for its dtype, casts, makes constants of a dtype or runs under autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.check import WIDTH, Between, Middle, numbers, outcome
from tests.tiers import tiers


def under_autocast(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.c(h)  # type: ignore[no-any-return]


def under_nested_autocast(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            wide = m.c(h.float())
        return F.linear(wide, m.c.weight).float()


def without_autocast(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return (h.float().softmax(-1) * 2).to(h.dtype)


def knows_autocast(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.c(h).float() * (2 if torch.is_autocast_enabled("cpu") else 1)


def attention(m: Any, h: torch.Tensor) -> torch.Tensor:
    low = torch.finfo(h.dtype).min
    mask = torch.full((h.shape[1], h.shape[1]), low, dtype=h.dtype).triu(1)
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)


def bits(m: Any, h: torch.Tensor) -> torch.Tensor:
    return (h.view(torch.int32) & -65536).view(torch.float32)


def quantised(m: Any, h: torch.Tensor) -> torch.Tensor:
    return (h * 16).round().clamp(-128, 127).to(torch.int8).to(h.dtype) / 16


def by_size_of_numbers(m: Any, h: torch.Tensor) -> torch.Tensor:
    return h * 2 if h.dtype.itemsize >= 4 else h


def by_class_of_tensor(m: Any, h: torch.Tensor) -> torch.Tensor:
    return h * 3 if h.type() == "torch.FloatTensor" else h


MIDDLES: dict[str, Middle] = {
    "eps of finfo": lambda m, h: h / (h.norm(dim=-1, keepdim=True) + torch.finfo(h.dtype).eps * 1e4),
    "eps of the weight's dtype": lambda m, h: h * math.sqrt(torch.finfo(m.a.weight.dtype).eps),
    "max of finfo": lambda m, h: h.exp().clamp(max=torch.finfo(h.dtype).max),
    "min of finfo": lambda m, h: h.masked_fill(h < 0, torch.finfo(h.dtype).min).softmax(-1),
    "is float32": lambda m, h: h * 2 if h.dtype == torch.float32 else h,
    "is bfloat16": lambda m, h: h * 2 if h.dtype == torch.bfloat16 else h,
    "is one of the narrow": lambda m, h: (
        h.float().tanh() if h.dtype in (torch.float16, torch.bfloat16) else h.sin()
    ).to(h),
    "by name of the dtype": lambda m, h: h * len(str(h.dtype)),
    "by class": by_class_of_tensor,
    "itemsize": by_size_of_numbers,
    "element_size": lambda m, h: h * h.element_size(),
    "new_tensor": lambda m, h: h * h.new_tensor(0.3),
    "new_full": lambda m, h: h * h.new_full((), 0.1),
    "tensor of dtype": lambda m, h: h * torch.tensor(0.3, dtype=h.dtype),
    "full": lambda m, h: h * torch.full((WIDTH,), 0.1, dtype=h.dtype),
    "arange": lambda m, h: h * (torch.arange(WIDTH, dtype=h.dtype) / 7),
    "where with a tensor": lambda m, h: torch.where(h > 0, h, torch.tensor(0.01, dtype=h.dtype) * h),
    "to bfloat16 and back": lambda m, h: h.to(torch.bfloat16).to(h.dtype),
    "bfloat16 and float": lambda m, h: h.bfloat16().float(),
    "double and back": lambda m, h: h.double().sigmoid().to(h.dtype),
    "a sum in double": lambda m, h: h.to(torch.float64).sum(-1, keepdim=True).to(h) * h,
    "float and type_as": lambda m, h: h.float().softmax(-1).type_as(h),
    "softmax in float32": lambda m, h: F.softmax(h, -1, dtype=torch.float32).to(h.dtype),
    "to the weight's dtype": lambda m, h: (h.float() * 1.5).to(m.b.weight.dtype),
    "to the default dtype": lambda m, h: h.to(torch.get_default_dtype()) * 2,
    "promoted with bfloat16": lambda m, h: h.to(torch.promote_types(h.dtype, torch.bfloat16)),
    "result type": lambda m, h: h.to(torch.result_type(h, torch.ones(1, dtype=torch.float16))).to(h.dtype),
    "float8": lambda m, h: h.to(torch.float8_e4m3fn).to(h.dtype),
    "int8": quantised,
    "bits of float32": bits,
    "complex": lambda m, h: torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * 1j).flatten(-2),
    "norm with an eps by dtype": lambda m, h: F.layer_norm(h, (WIDTH,), eps=1e-5 if h.dtype == torch.float32 else 1e-2),
    "attention with a mask": attention,
    "autocast": under_autocast,
    "autocast in autocast": under_nested_autocast,
    "no autocast": without_autocast,
    "asks for autocast": knows_autocast,
}

LINEAR = {"autocast", "autocast in autocast", "asks for autocast"}
NARROW_LAST = {"autocast"}
"""What comes out of these is in bfloat16, which the last layer takes once it is cast."""

FROZEN = {"min of finfo", "float and type_as", "softmax in float32", "norm with an eps by dtype", "no autocast"}
"""The graph is the module, and no unit can go."""

SOME = (
    "eps of finfo", "is float32", "is one of the narrow", "element_size", "new_tensor", "tensor of dtype",
    "to bfloat16 and back", "double and back", "softmax in float32", "attention with a mask", "min of finfo",
)  # fmt: skip


def probe(name: str, dtype: torch.dtype) -> nn.Module:
    middle = MIDDLES[name]
    parts = {"c": nn.Linear(WIDTH, WIDTH)} if name in LINEAR else {}
    last: Middle = (lambda m, h: middle(m, h).to(m.b.weight.dtype)) if name in NARROW_LAST else middle
    return Between(last, **parts).eval().to(dtype)


@pytest.mark.parametrize("name", tiers(MIDDLES, *SOME))
def test_of_a_float32_module(name: str) -> None:
    found = outcome(probe(name, torch.float32), {"x": numbers(2, 5, 4)}, [{"x": numbers(3, 8, 4)}])
    assert found == ("frozen" if name in FROZEN else "exact")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", tiers(SOME, "is float32"))
def test_of_a_module_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    inputs = [{"x": numbers(2, 5, 4, dtype=dtype)}, {"x": numbers(3, 8, 4, dtype=dtype)}]
    assert outcome(probe(name, dtype), inputs[0], inputs[1:]) == ("frozen" if name in FROZEN else "exact")


def mixed(*changed: str, middle: Middle) -> nn.Module:
    module = Between(middle, c=nn.Linear(WIDTH, WIDTH), s=nn.Parameter(numbers(WIDTH))).eval()
    for name in changed:
        part = getattr(module, name)
        setattr(module, name, part.bfloat16() if isinstance(part, nn.Module) else nn.Parameter(part.data.bfloat16()))
    return module


@pytest.mark.parametrize(
    "module",
    [
        mixed("c", middle=lambda m, h: m.c(h.bfloat16()).float()),
        mixed("c", middle=lambda m, h: m.c(h.to(m.c.weight.dtype)).to(h.dtype)),
        mixed("s", middle=lambda m, h: h * m.s),
        mixed("s", middle=lambda m, h: (h.to(m.s.dtype) * m.s).to(h)),
        mixed("b", middle=lambda m, h: h.bfloat16()),
        mixed("b", "c", middle=lambda m, h: m.c(h.to(torch.bfloat16)).relu()),
    ],
    ids=["literal", "by weight", "scale", "scale, cast", "last", "two"],
)
def test_of_a_module_of_several_dtypes(module: nn.Module) -> None:
    assert outcome(module, {"x": numbers(2, 5, 4)}, [{"x": numbers(3, 8, 4)}]) == "exact"
