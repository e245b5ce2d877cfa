"""Code with a state, with gradients of its own, with hooks, with randomness, with inputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
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


def test_state_that_only_python_sees_is_refused_or_as_in_the_first_call() -> None:
    module = Between(depends_on_python).eval()
    found = outcome(module, X, OTHER)
    assert found == "exact", found


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


def hooked(register: Callable[[nn.Module, list[Any]], None]) -> tuple[nn.Module, list[Any]]:
    module, calls = Between(lambda m, h: m.c(h), **c()).eval(), []
    register(module, calls)
    return module, calls


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
    module, calls = hooked(HOOKS[kind])
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
        """Return (batch, tokens, 3)."""
        return self.b(self.how(self.a, xs, mode, scale, more))  # type: ignore[no-any-return]


def by_mode(h: torch.Tensor, mode: Any) -> torch.Tensor:
    return h.relu() if mode == "relu" else h.tanh()


T = numbers(2, 5, 4)

NESTED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], list[dict[str, Any]]]] = {
    "a list": (lambda a, xs, mode, scale, more: a(xs[0] + xs[1]), {"xs": [T, T]}, [{"xs": [T[:, :3], T[:, :3]]}]),
    "a tuple": (lambda a, xs, mode, scale, more: a(xs[0] * xs[1]), {"xs": (T, T)}, []),
    "a dict": (lambda a, xs, mode, scale, more: a(xs["p"] - xs["q"]), {"xs": {"p": T, "q": T * 2}}, []),
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
