"""Code with a state, with gradients of its own, with hooks, with randomness, with inputs that are no tensors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import fxprune
from tests.probes.check import WIDTH, Between, Middle, numbers, outcome
from tests.tiers import tiers

X = {"x": numbers(2, 5, 4)}
OTHER = ({"x": numbers(3, 8, 4)},)


class StraightThrough(torch.autograd.Function):
    """Signs, whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class Louder(torch.autograd.Function):
    """The identity, whose gradient is ten times as large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 10


def all_without_gradients(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return m.c(h)  # type: ignore[no-any-return]


def gradients_again(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        part = m.c(h)
        with torch.enable_grad():
            other = m.d(h)
        late = part * 2
    return h + late + other + part


def inference(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        scale = m.c(h)
    return h * scale.clone()


def depends_on_calls(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.calls.add_(1)
    return h * m.calls


def running_mean(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.mean.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
    return h - m.mean


def depends_on_python(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.number = getattr(m, "number", 0) + 1
    return h * m.number


def keeps_what_it_saw(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.seen = h
    return h * 2


def writes_to_hidden(m: Any, h: torch.Tensor) -> torch.Tensor:
    h[..., 0] = 0
    return h.add_(1)


def modifies_data(m: Any, h: torch.Tensor) -> torch.Tensor:
    part = h * 1
    part.data.mul_(2)
    return part


def inner_gradient(m: Any, h: torch.Tensor) -> torch.Tensor:
    y = h.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad((y * y * y).sum(), y)
    return h + found


def scaled_by_hook(m: Any, h: torch.Tensor) -> torch.Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 5)
    return h * 2


SCALE = {"value": 2.0}


def c() -> dict[str, Any]:
    return {"c": nn.Linear(WIDTH, WIDTH)}


MIDDLES: dict[str, tuple[Middle, Callable[[], dict[str, Any]]]] = {
    "no_grad around all": (all_without_gradients, c),
    "enable_grad in no_grad": (gradients_again, lambda: c() | {"d": nn.Linear(WIDTH, WIDTH)}),
    "inference_mode": (inference, c),
    "is_grad_enabled": (lambda m, h: h * (2 if torch.is_grad_enabled() else 2.0), dict),
    "detach": (lambda m, h: h + m.c(h).detach(), c),
    "detach in place": (lambda m, h: h + m.c(h).detach_(), c),
    "data": (lambda m, h: h + m.c(h).data, c),
    "straight through": (lambda m, h: StraightThrough.apply(h), dict),
    "louder gradient": (lambda m, h: Louder.apply(m.c(h)), c),
    "hook on a tensor": (scaled_by_hook, dict),
    "checkpoint": (lambda m, h: checkpoint(m.c, h, use_reentrant=False), c),
    "gradient inside": (inner_gradient, dict),
    "depends on a counter": (depends_on_calls, lambda: {"calls": torch.zeros(())}),
    "depends on a number of Python": (depends_on_python, dict),
    "running mean": (running_mean, lambda: {"mean": torch.zeros(WIDTH)}),
    "keeps what it saw": (keeps_what_it_saw, dict),
    "writes to hidden": (writes_to_hidden, dict),
    "writes to data": (modifies_data, dict),
    "a global": (lambda m, h: h * SCALE["value"], dict),
    "random numbers": (lambda m, h: h + torch.rand_like(h), dict),
    "dropout in training": (lambda m, h: F.dropout(h, 0.5, m.training), dict),
    "other in training": (lambda m, h: h * 3 if m.training else h * 2, dict),
    "batch norm": (lambda m, h: m.norm(h.mT).mT, lambda: {"norm": nn.BatchNorm1d(WIDTH)}),
    "weight norm by hook": (lambda m, h: m.c(h), lambda: {"c": weight_norm(nn.Linear(WIDTH, WIDTH))}),
    "weight norm": (lambda m, h: m.c(h), lambda: {"c": parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))}),
    "spectral norm": (lambda m, h: m.c(h), lambda: {"c": parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))}),
}

REFUSED = {
    "detach in place": "cannot be traced",
    "data": "x.detach()",
    "writes to data": "x.detach()",
}
"""Words of the refusal of those that tracing does not follow."""


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", tiers(MIDDLES, *list(MIDDLES)[::5]))
def test_of_state_and_gradients(name: str, training: bool) -> None:
    middle, parts = MIDDLES[name]
    module = Between(middle, **parts()).train(training)
    found = outcome(module, X, OTHER)
    assert REFUSED[name] in found if name in REFUSED else found in ("exact", "frozen"), found
    assert all(part.training == training for part in module.modules())


@pytest.mark.parametrize("name", ["straight through", "louder gradient", "hook on a tensor"])
def test_gradients_that_a_graph_does_not_have_are_named_and_asked_for_no_more(name: str) -> None:
    middle, parts = MIDDLES[name]
    module = Between(middle, **parts()).eval()
    traced = fxprune.trace(module, X)
    assert any("gradients" in note and "a.weight" in note for note in traced.notes), traced.notes


HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda m, calls: m.a.register_forward_hook(lambda *args: calls.append("forward")),
    "pre": lambda m, calls: m.register_forward_pre_hook(lambda *args: calls.append("pre")),
    "with keywords": lambda m, calls: m.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append("pre"), with_kwargs=True
    ),
    "backward": lambda m, calls: m.c.register_full_backward_hook(lambda *args: calls.append("backward")),
    "always": lambda m, calls: m.c.register_forward_hook(lambda *args: calls.append("always"), always_call=True),
}


@pytest.mark.parametrize("kind", tiers(HOOKS, "with keywords", "backward"))
def test_hooks_of_the_user_are_left_out_and_reported(kind: str) -> None:
    module, calls = Between(lambda m, h: m.c(h), **c()).eval(), list[Any]()
    HOOKS[kind](module, calls)
    traced = fxprune.trace(module, X)
    fxprune.prune(module, importance="l2", ratio=0.1, protect=(), example_inputs=X)
    assert calls == []
    assert any("hooks" in note for note in traced.notes)
    module(**X).sum().backward()
    assert calls


class Nested(nn.Module):
    """Takes lists, dicts and what is no tensor."""

    def __init__(self, how: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, xs: Any, mode: Any = "relu", scale: float = 2.0, more: Any = None) -> torch.Tensor:
        return self.b(self.how(self.a, xs, mode, scale, more))  # type: ignore[no-any-return]


def by_mode(h: torch.Tensor, mode: Any) -> torch.Tensor:
    return h.relu() if mode == "relu" else h.tanh()


T = numbers(2, 5, 4)

NESTED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], list[dict[str, Any]]]] = {
    "a list": (lambda a, xs, mode, scale, more: a(xs[0] + xs[1]), {"xs": [T, T]}, [{"xs": [T[:, :3], T[:, :3]]}]),
    "a dict of lists": (lambda a, xs, mode, scale, more: a(xs["p"][0] + xs["p"][1]), {"xs": {"p": [T, T * 2]}}, []),
    "a word": (
        lambda a, xs, mode, scale, more: by_mode(a(xs), mode),
        {"xs": T, "mode": "tanh"},
        [{"xs": T}, {"xs": T, "mode": "relu"}],
    ),
    "a flag": (
        lambda a, xs, mode, scale, more: a(xs).relu() if more else a(xs),
        {"xs": T, "more": True},
        [{"xs": T, "more": False}, {"xs": T}],
    ),
    "a number": (
        lambda a, xs, mode, scale, more: a(xs) * scale,
        {"xs": T, "scale": 3.0},
        [{"xs": T, "scale": 4.0}, {"xs": T}],
    ),
    "none": (lambda a, xs, mode, scale, more: a(xs if more is None else xs + more), {"xs": T, "more": None}, []),
    "no tensor in a list": (lambda a, xs, mode, scale, more: a(xs[0]) * xs[1], {"xs": [T, 3]}, [{"xs": [T, 4]}]),
}


@pytest.mark.parametrize("name", tiers(NESTED, "a dict of lists", "a number"))
def test_of_inputs_that_are_no_tensors(name: str) -> None:
    how, inputs, others = NESTED[name]
    found = outcome(Nested(how).eval(), inputs, others)
    assert found == "exact" or "traced with" in found or "missing" in found, found
    assert list(fxprune.trace(Nested(how).eval(), inputs).graph_module.forward.__code__.co_varnames[1:2]) == ["xs"]


def under_autocast(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = m.c(h)
    return narrow.to(m.b.weight.dtype)  # type: ignore[no-any-return]


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


TYPED: dict[str, Middle] = {
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
    "by class": lambda m, h: h * 3 if h.type() == "torch.FloatTensor" else h,
    "itemsize": lambda m, h: h * 2 if h.dtype.itemsize >= 4 else h,
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
    "int8": lambda m, h: (h * 16).round().clamp(-128, 127).to(torch.int8).to(h.dtype) / 16,
    "bits of float32": bits,
    "complex": lambda m, h: torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * 1j).flatten(-2),
    "norm with an eps by dtype": lambda m, h: F.layer_norm(h, (WIDTH,), eps=1e-5 if h.dtype == torch.float32 else 1e-2),
    "attention with a mask": attention,
    "autocast": under_autocast,
    "autocast in autocast": under_nested_autocast,
    "no autocast": without_autocast,
    "asks for autocast": knows_autocast,
}

FROZEN_TYPED = {"min of finfo", "float and type_as", "softmax in float32", "norm with an eps by dtype", "no autocast"}
"""The graph is the module, and no unit can go."""

SOME_TYPED = (
    "eps of finfo", "is float32", "is one of the narrow", "element_size", "new_tensor", "tensor of dtype",
    "to bfloat16 and back", "double and back", "softmax in float32", "attention with a mask", "min of finfo",
)  # fmt: skip


def probe(name: str, dtype: torch.dtype) -> nn.Module:
    return Between(TYPED[name], **c()).eval().to(dtype)


@pytest.mark.parametrize("name", tiers(TYPED, *SOME_TYPED))
def test_of_a_float32_module(name: str) -> None:
    found = outcome(probe(name, torch.float32), {"x": numbers(2, 5, 4)}, [{"x": numbers(3, 8, 4)}])
    assert found == ("frozen" if name in FROZEN_TYPED else "exact")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", tiers(SOME_TYPED, "is float32"))
def test_of_a_module_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    inputs = [{"x": numbers(2, 5, 4, dtype=dtype)}, {"x": numbers(3, 8, 4, dtype=dtype)}]
    assert outcome(probe(name, dtype), inputs[0], inputs[1:]) == ("frozen" if name in FROZEN_TYPED else "exact")


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


TRACED = (2, 7)
OTHER_SIZES = ((1, 7), (2, 1), (1, 1), (3, 5), (5, 8), (2, 12), (4, 13), (7, 7), (2, 14), (3, 16), (2, 24))


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

SIZED: dict[str, Middle] = {
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
    "chunks": lambda m, h: torch.cat([part - part.mean(1, keepdim=True) for part in h.split(4, 1)], 1),
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


@pytest.mark.parametrize("name", tiers(SIZED, *list(SIZED)[::6]))
def test_of_sizes(name: str) -> None:
    module = Between(SIZED[name], mask=numbers(16, 16), table=nn.Embedding(16, 1)).eval()
    found = outcome(module, {"x": numbers(*TRACED, 4)}, [{"x": numbers(*sizes, 4)} for sizes in OTHER_SIZES])
    assert found in ("exact", "frozen") or "traced" in found or "size" in found, found


class Two(nn.Module):
    """Two inputs, perhaps of equal sizes."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.a, self.c, self.b = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
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
