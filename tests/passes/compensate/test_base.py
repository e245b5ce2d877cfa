"""Fits of experts and of convolutions against ridge regression by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.passes.compensate import LeastSquaresPass, RotationPass
from torch import nn

from fxprune.graph.facts import fork
from fxprune.graph.tensors import get_tensor
from tests.oracle import Net
from tests.passes.compensate.test_least_squares import X, planned, slim_graph_of

DAMPING = 0.03


def drawn(*shape: int) -> nn.Parameter:
    """A parameter with random values."""
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
    work = fork(planned(model, {"x": X}, 7))
    assert LeastSquaresPass(damping=DAMPING, each=each)(work, inplace=True).modified
    tokens, up, down = of_each(model, X, body)
    hidden = [(x @ w.T).relu().double() for x, w in zip(tokens, up, strict=True)]
    assert [len(h) > 0 for h in hidden] == [True, True, True, False]
    squares = sum(h[:, :7].square().sum(0) for h in hidden) / 3
    ridge = DAMPING * (squares if each else squares.mean().expand(7))  # type: ignore[union-attr]
    fitted = get_tensor(work, "down")
    fitted = fitted.mT if body is masked_out else fitted
    for e, h in enumerate(hidden):
        w = down[e, :, :7].double()
        left = torch.cat([h[:, :7], ridge.sqrt().diag()])
        right = torch.cat([h @ down[e].double().T, ridge.sqrt().diag() @ w.T])
        wanted = torch.linalg.lstsq(left, right).solution.T
        assert torch.allclose(fitted[e, :, :7].double(), wanted, atol=1e-5)
        assert torch.equal(fitted[e, :, 7:], down[e, :, 7:])
    assert torch.equal(fitted[3], down[3])
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
    work = fork(planned(model, {"x": X}, 4))
    LeastSquaresPass(damping=DAMPING, bias=False)(work, inplace=True)
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
        left = torch.cat([h, ridge * torch.eye(4)])
        right = torch.cat([inside[0][chosen[e]] @ w.T, ridge * w[:, :4].T])
        wanted = torch.linalg.lstsq(left, right).solution.T
        assert torch.allclose(get_tensor(work, "down")[e, :, :4].double(), wanted, atol=1e-4)


def test_experts_stay_where_nothing_goes_or_others_read_them() -> None:
    assert not LeastSquaresPass()(fork(planned(experts(picked), {"x": X}, 12)), inplace=True).modified
    twice = experts(picked)
    twice.body = lambda m, x: picked(m, x) + picked(m, x + 1)
    assert not LeastSquaresPass()(fork(planned(twice, {"x": X}, 7)), inplace=True).modified
    read = experts(picked)
    read.body = lambda m, x: picked(m, x) + m.down.sum()
    assert not LeastSquaresPass()(fork(planned(read, {"x": X}, 7)), inplace=True).modified


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
    work = fork(planned(model, {"x": X}, 7))
    assert LeastSquaresPass(damping=DAMPING, bias=False)(work, inplace=True).modified
    taps = options["kernel_size"]
    hidden = nn.functional.pad(model.a(X).relu(), (taps // 2, taps // 2)).unfold(-1, taps, 1)
    rows = hidden.permute(0, 2, 1, 3).flatten(0, 1).double()
    w = model.b.weight.double()
    x, old = rows[:, :7].flatten(1), w[:, :7].flatten(1)
    ridge = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(7 * taps).double()
    left, right = torch.cat([x, ridge]), torch.cat([rows.flatten(1) @ w.flatten(1).T, ridge @ old.T])
    wanted = torch.linalg.lstsq(left, right).solution.T.view(7, 7, taps)
    assert torch.allclose(get_tensor(work, "b.weight")[:, :7].double(), wanted, atol=1e-5)
    assert torch.equal(get_tensor(work, "b.weight")[:, 7:], model.b.weight[:, 7:])


@torch.no_grad()
def test_a_bias_of_a_convolution_takes_up_the_mean_of_what_went() -> None:
    model = convolutions(False, kernel_size=3)
    work = fork(planned(model, {"x": X}, 7))
    LeastSquaresPass(damping=1e9)(work, inplace=True)
    hidden = model.a(X).relu()
    gone = nn.functional.conv1d(hidden[:, 7:], model.b.weight[:, 7:]).mean((0, 2))
    assert torch.allclose(get_tensor(work, "b.bias"), model.b.bias + gone, atol=1e-5)
