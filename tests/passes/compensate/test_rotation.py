"""Rotation: the orthogonal map by hand, and what it leaves as it is."""

from __future__ import annotations

import pytest
import torch
from fxprune.passes.compensate import RotationPass

from fxprune.errors import ArgumentError
from fxprune.graph.facts import fork
from fxprune.graph.tensors import get_tensor
from tests.passes.compensate.test_least_squares import X, network, planned


def test_the_kept_columns_are_turned_towards_what_is_wanted() -> None:
    model = network()
    work = fork(planned(model, {"x": X}, 7))
    assert RotationPass(damping=1e-6)(work, inplace=True).modified
    hidden = model.a(X).relu().flatten(0, 1).detach()
    w = model.b.weight[:, :7].detach()
    fitted = get_tensor(work, "b.weight").detach()[:, :7]
    Y, Z = hidden @ model.b.weight.detach().T, hidden[:, :7] @ w.T
    Q = fitted @ torch.linalg.pinv(w)
    assert torch.allclose(Q @ Q.T, torch.eye(6), atol=1e-4)
    assert torch.allclose(fitted.norm(dim=0), w.norm(dim=0), atol=1e-4)
    error = float((Y - Z @ Q.T).square().sum())
    assert error < float((Y - Z).square().sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # no small turn of it does better
        skew = torch.randn(6, 6, generator=generator) * 0.05
        turned = torch.matrix_exp(skew - skew.T) @ Q
        assert float((Y - Z @ turned.T).square().sum()) > error
    assert torch.equal(get_tensor(work, "b.bias"), model.b.bias)
    assert torch.equal(get_tensor(work, "b.weight")[:, 7:], model.b.weight[:, 7:])


def test_much_damping_turns_nothing() -> None:
    model = network()
    work = fork(planned(model, {"x": X}, 7))
    RotationPass(damping=1e9)(work, inplace=True)
    assert torch.allclose(get_tensor(work, "b.weight"), model.b.weight, atol=1e-5)
    with pytest.raises(ArgumentError):
        RotationPass(damping=0)
