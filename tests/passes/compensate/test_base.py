"""Fits of experts and of convolutions against ridge regression by hand, and rotations against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.passes.compensate import LeastSquaresPass, RotationPass
from torch import nn

from fxprune.errors import ArgumentError
from fxprune.graph.facts import fork
from fxprune.graph.tensors import get_tensor, weights
from tests.oracle import Net
from tests.passes.compensate.test_least_squares import (
    X,
    by_hand,
    fitted,
    network,
    planned,
    ridge_solution,
    slim_graph_of,
)

DAMPING = 0.03


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5)


def picked(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Experts ``(experts, out, in)``, two for each token, whose matrices are picked for it."""
    tokens = x.reshape(-1, 6)
    chosen = m.router(tokens).topk(2, dim=-1).indices.reshape(-1)
    rows = tokens.repeat_interleave(2, dim=0)[..., None]
    hidden = torch.bmm(m.up[chosen], rows).relu()
    return torch.bmm(m.down[chosen], hidden).view(-1, 2, 6).sum(1).view(x.shape)


def masked_out(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Experts ``(experts, in, out)`` that are given all tokens, those that are not meant for them as zeros."""
    tokens = x.reshape(-1, 6)
    chosen = m.router(tokens).topk(2, dim=-1).indices
    meant = torch.zeros_like(m.router(tokens)).scatter(-1, chosen, 1.0).T
    hidden = torch.bmm(meant[..., None] * tokens, m.up).relu()
    return torch.bmm(hidden, m.down).sum(0).view(x.shape)  # type: ignore[no-any-return]


def experts(body: Callable[[Any, torch.Tensor], torch.Tensor]) -> Net:
    """Four experts with 12 hidden units each, of which the last is never chosen."""
    up, down = drawn(4, 12, 6), drawn(4, 6, 12)
    if body is masked_out:
        up, down = (nn.Parameter(weight.detach().mT.clone()) for weight in (up, down))
    torch.manual_seed(0)
    router = nn.Linear(6, 4)
    with torch.no_grad():
        router.bias[3] = -100
    return Net(body, router=router, up=up, down=down)


def of_each(model: Any, x: torch.Tensor, body: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The tokens of each expert, and both weights as ``(experts, out, in)``."""
    tokens = x.reshape(-1, 6)
    chosen = model.router(tokens).topk(2, dim=-1).indices
    up, down = (w.mT if body is masked_out else w for w in (model.up.detach(), model.down.detach()))
    return [tokens[(chosen == e).any(-1)] for e in range(4)], up, down


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("body", [picked, masked_out])
@torch.no_grad()
def test_each_expert_has_a_ridge_solution_of_its_own(body: Any, each: bool) -> None:
    model = experts(body)
    work = fitted(model, LeastSquaresPass(damping=DAMPING, each=each))
    tokens, up, down = of_each(model, X, body)
    hidden = [(x @ w.T).relu().double() for x, w in zip(tokens, up, strict=True)]
    assert [len(h) > 0 for h in hidden] == [True, True, True, False]
    squares = sum(h[:, :7].square().sum(0) for h in hidden) / 3
    ridge = DAMPING * (squares if each else squares.mean().expand(7))  # type: ignore[union-attr]
    new = get_tensor(work, "down")
    new = new.mT if body is masked_out else new
    for e, h in enumerate(hidden):
        w = down[e].double()
        wanted = ridge_solution(w[:, :7], h[:, :7], h @ w.T, ridge.sqrt().diag())
        assert torch.allclose(new[e, :, :7], wanted, atol=1e-5)
        assert torch.equal(new[e, :, 7:], down[e, :, 7:])
    assert torch.equal(new[3], down[3])
    assert torch.equal(get_tensor(work, "up"), model.up)  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [picked, masked_out])
@torch.no_grad()
def test_what_other_units_can_say_is_not_lost(body: Any) -> None:
    """Units that are copies of others: the fit gives the dense outputs, where masking does not."""
    model = experts(body)
    for e in range(4):
        up = model.up[e].T if body is masked_out else model.up[e]  # type: ignore[index]
        up[6:] = 2 * up[:6]
    dense = planned(model, {"x": X}, 6)
    errors = []
    for fit in (None, LeastSquaresPass(damping=1e-7), LeastSquaresPass(), RotationPass()):
        work = fork(dense)
        if fit is not None:
            assert fit(work, inplace=True).modified
            down = get_tensor(work, "down")
            assert torch.equal(down[3], model.down[3])  # type: ignore[index]
        errors.append(float((slim_graph_of(work)(X) - model(X)).abs().max()))
    assert errors[0] > 0.5 and errors[1] < 1e-3 and max(errors[2:]) < errors[0]


@torch.no_grad()
def test_tokens_that_go_elsewhere_without_what_went_do_not_count() -> None:
    """A network before the router loses units as well, so that some tokens are sent to other experts."""
    model = experts(picked)
    model.a, model.b = nn.Linear(6, 12), nn.Linear(12, 6)
    model.body = lambda m, x: picked(m, x + m.b(m.a(x).relu()))
    work = fitted(model, LeastSquaresPass(damping=DAMPING, bias=False), 4)
    flat = X.reshape(-1, 6)
    hidden = model.a(flat).relu()
    streams = [flat + model.b(hidden)]
    streams.append(flat + hidden[:, :4] @ get_tensor(work, "b.weight")[:, :4].T + model.b.bias)
    rows = [s.repeat_interleave(2, 0) for s in streams]
    there, here = (model.router(s).topk(2, dim=-1).indices.reshape(-1) for s in streams)  # type: ignore[operator]
    assert 0 < int((there != here).sum()) < len(there) * 0.8
    up, down = model.up, model.down
    inside = [torch.einsum("ti,toi->to", x, up[here]).relu().double() for x in rows]  # type: ignore[index]
    chosen = [(there == here) & (here == e) for e in range(4)]
    kept = [inside[1][rows, :4] for rows in chosen]
    ridge = (DAMPING * sum(h.square().sum(0) for h in kept).mean() / sum(len(h) > 0 for h in kept)).sqrt()  # type: ignore[union-attr]
    for e, h in enumerate(kept):
        w = down[e].double()  # type: ignore[index]
        wanted = ridge_solution(w[:, :4], h, inside[0][chosen[e]] @ w.T, ridge * torch.eye(4))
        assert torch.allclose(get_tensor(work, "down")[e, :, :4], wanted, atol=1e-4)


def test_weights_stay_where_nothing_goes_or_others_read_them() -> None:
    twice, read = experts(picked), experts(picked)
    twice.body = lambda m, x: picked(m, x) + picked(m, x + 1)
    read.body = lambda m, x: picked(m, x) + m.down.sum()
    linear = Net(lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(x).sigmoid()), a=nn.Linear(6, 12), b=nn.Linear(12, 6))
    for model, stay in ((experts(picked), 12), (twice, 7), (read, 7), (linear, 7)):
        work = fork(planned(model, {"x": X}, stay))
        before = dict(weights(work))
        assert not LeastSquaresPass()(work, inplace=True).modified
        assert all(tensor is before[name] for name, tensor in weights(work))


def convolutions(residual: bool, **options: Any) -> Net:
    """Two convolutions around a ReLU, added to their input or not."""
    torch.manual_seed(1)

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = m.b(m.a(x).relu())
        return x + out if residual else out

    return Net(body, a=nn.Conv1d(7, 12, 1), b=nn.Conv1d(12, 7, **options))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}])
@torch.no_grad()
def test_a_convolution_is_fitted_over_channels_and_taps(options: dict[str, int], residual: bool) -> None:
    model = convolutions(residual, **options)
    work = fitted(model, LeastSquaresPass(damping=DAMPING, bias=False))
    taps = options["kernel_size"]
    hidden = nn.functional.pad(model.a(X).relu(), (taps // 2, taps // 2)).unfold(-1, taps, 1)
    rows = hidden.permute(0, 2, 1, 3).flatten(0, 1).double()
    w = model.b.weight.double()
    wanted = by_hand(w[:, :7].flatten(1), rows[:, :7].flatten(1), rows.flatten(1) @ w.flatten(1).T)
    assert torch.allclose(get_tensor(work, "b.weight")[:, :7], wanted.view(7, 7, taps), atol=1e-5)
    assert torch.equal(get_tensor(work, "b.weight")[:, 7:], model.b.weight[:, 7:])


@torch.no_grad()
def test_a_bias_of_a_convolution_takes_up_the_mean_of_what_went() -> None:
    model = convolutions(False, kernel_size=3)
    work = fitted(model, LeastSquaresPass(damping=1e9))
    hidden = model.a(X).relu()
    gone = nn.functional.conv1d(hidden[:, 7:], model.b.weight[:, 7:]).mean((0, 2))
    assert torch.allclose(get_tensor(work, "b.bias"), model.b.bias + gone, atol=1e-5)


def test_the_kept_columns_are_turned_towards_what_is_wanted() -> None:
    model = network()
    work = fitted(model, RotationPass(damping=1e-6))
    hidden = model.a(X).relu().flatten(0, 1).detach()
    w = model.b.weight[:, :7].detach()
    new = get_tensor(work, "b.weight").detach()[:, :7]
    Y, Z = hidden @ model.b.weight.detach().T, hidden[:, :7] @ w.T
    Q = new @ torch.linalg.pinv(w)
    assert torch.allclose(Q @ Q.T, torch.eye(6), atol=1e-4)
    assert torch.allclose(new.norm(dim=0), w.norm(dim=0), atol=1e-4)
    error = float((Y - Z @ Q.T).square().sum())
    assert error < float((Y - Z).square().sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # no small turn of it does better
        skew = torch.randn(6, 6, generator=generator) * 0.05
        turned = torch.matrix_exp(skew - skew.T) @ Q
        assert float((Y - Z @ turned.T).square().sum()) > error
    assert torch.equal(get_tensor(work, "b.bias"), model.b.bias)
    assert torch.equal(get_tensor(work, "b.weight")[:, 7:], model.b.weight[:, 7:])
    work = fork(planned(model, {"x": X}, 7))
    RotationPass(damping=1e9)(work, inplace=True)
    assert torch.allclose(get_tensor(work, "b.weight"), model.b.weight, atol=1e-5)
    with pytest.raises(ArgumentError):
        RotationPass(damping=0)
