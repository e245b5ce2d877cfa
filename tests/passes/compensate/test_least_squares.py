"""Fits of the kept weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fxprune.passes.compensate import LeastSquaresPass, RotationPass
from fxprune.passes.compensate.fits import Damping, FitMoments, StackedMoments, best_damping
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.data.calibration import Calibration, Sample
from fxprune.errors import ArgumentError, CalibrationError
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.graph.tensors import get_tensor, weights
from fxprune.masking.masked_run import PreciseRun
from fxprune.pipeline.contract import Pass, sharing
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal, Removed
from tests.models import tiny, token_ids
from tests.oracle import Net, decide, discover, groups_of, leaving
from tests.tiers import SLOW

X = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
DAMPING = 0.03


def network() -> Net:
    torch.manual_seed(1)
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(6, 12), b=nn.Linear(12, 6))


def deep() -> nn.Module:
    """Three residual networks and a readout."""
    torch.manual_seed(2)
    sizes = [{"a": nn.Linear(6, 12), "b": nn.Linear(12, 6)} for _ in range(3)]
    networks = (Net(lambda m, x: x + m.b(m.a(x).relu()), **parts) for parts in sizes)
    return nn.Sequential(*networks, nn.Linear(6, 6)).eval()


def first_units(dense: fx.GraphModule, stay: int) -> Keep:
    """What is left where only the first units of each hidden layer stay."""
    factors = [group.factor for group in groups_of(dense) if group.factor is not None and group.size == 12]
    return Keep({factor: np.arange(factor.size) < stay for factor in factors})


def planned(model: nn.Module, inputs: dict[str, torch.Tensor], stay: int) -> fx.GraphModule:
    """The graph of a model with calibration data and a plan by which the last units of each hidden layer go."""
    dense = discover(model, inputs)
    decide(dense, first_units(dense, stay))
    samples = (Sample({next(iter(inputs)): x[None]}, x[None]) for x in next(iter(inputs.values())))
    facts_of(dense).put(Calibration(tuple(samples)))
    return dense


def fitted(model: nn.Module, step: Pass, stay: int = 7, name: str = "x") -> fx.GraphModule:
    """The graph of a model with a plan, after a fit."""
    work = fork(planned(model, {name: X}, stay))
    assert step(work, inplace=True).modified
    return work


def by_hand(
    w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, damping: Any = DAMPING, each: bool = False
) -> torch.Tensor:
    """Ridge regression towards ``w`` on rows ``x`` and ``y``, as a stacked least-squares problem."""
    squares = x.square().sum(0)
    weight = (damping * (squares if each else squares.mean().expand(len(squares)))).sqrt().diag()
    return ridge_solution(w, x, y, weight)


def ridge_solution(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    w, x, y, weight = (part.double() for part in (w, x, y, weight))
    left, right = torch.cat([x, weight]), torch.cat([y, weight @ w.T])
    return torch.linalg.lstsq(left, right).solution.T.float()


def test_a_sum_is_fitted_and_not_its_term() -> None:
    """The second network makes up for what the first could not, and so on: its target is what the stream lacks."""
    model = deep()
    work = fitted(model, LeastSquaresPass(damping=DAMPING, bias=False), name="input")
    with torch.no_grad():
        x = slim = X.flatten(0, 1)
        for i in range(3):
            a, b = model[i].a, model[i].b
            x = model[i](x)
            hidden = a(slim).relu()[:, :7]
            w = by_hand(b.weight[:, :7], hidden, x - slim - b.bias)
            assert torch.allclose(get_tensor(work, f"{i}.b.weight")[:, :7], w, atol=1e-4)
            slim = slim + hidden @ w.T + b.bias


@torch.no_grad()
def test_the_kept_columns_are_the_ridge_solution_with_the_damping_that_does_best_on_other_tokens() -> None:
    model = network()
    hidden = model.a(X).relu().flatten(0, 1)
    w, x, y = model.b.weight[:, :7], hidden[:, :7], hidden @ model.b.weight.T
    work = fitted(model, LeastSquaresPass(damping=DAMPING, bias=False))
    assert torch.allclose(get_tensor(work, "b.weight")[:, :7], by_hand(w, x, y), atol=1e-5)
    assert torch.equal(get_tensor(work, "b.weight")[:, 7:], model.b.weight[:, 7:])
    work = fitted(model, LeastSquaresPass(bias=False))
    front = len(x) * 3 // 4
    errors = {}
    for damping in ((d, each) for d in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0) for each in (False, True)):
        trial = by_hand(w, x[:front], y[:front], *damping)
        errors[damping] = float((x[front:] @ trial.T - y[front:]).square().sum())
    best = min(errors, key=errors.__getitem__)
    assert errors[best] < float((x[front:] @ w.T - y[front:]).square().sum())
    assert torch.allclose(get_tensor(work, "b.weight")[:, :7], by_hand(w, x, y, *best), atol=1e-5)


def test_a_bias_takes_up_the_mean_of_what_went() -> None:
    model = network()
    work = fitted(model, LeastSquaresPass(damping=1e9))  # the weight hardly moves
    gone = model.a(X).relu().flatten(0, 1)[:, 7:] @ model.b.weight[:, 7:].T
    assert torch.allclose(get_tensor(work, "b.bias"), model.b.bias + gone.mean(0), atol=1e-5)
    assert torch.allclose(get_tensor(work, "b.weight"), model.b.weight, atol=1e-5)
    work = fitted(model, LeastSquaresPass(damping=0.1, each=True))
    hidden = torch.cat([model.a(X).relu().flatten(0, 1)[:, :7], torch.ones(35, 1)], 1).double()
    lost = (model.a(X).relu().flatten(0, 1) @ model.b.weight.T + model.b.bias).double()
    ridge = (0.1 * hidden.square().sum(0) * torch.tensor([1.0] * 7 + [0.0])).diag()
    start = torch.cat([model.b.weight[:, :7], model.b.bias[:, None]], 1).double()
    wanted = start.T + torch.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ (lost - hidden @ start.T))
    assert torch.allclose(get_tensor(work, "b.weight")[:, :7], wanted[:7].T.float(), atol=1e-4)
    assert torch.allclose(get_tensor(work, "b.bias"), wanted[7].float(), atol=1e-4)


def test_what_lost_nothing_makes_up_for_what_the_stream_lost() -> None:
    """The last of three networks is whole, and is fitted too where that is asked for."""
    model = deep()
    dense = planned(model, {"input": X}, 7)
    removal = facts_of(dense)[Removal]
    last = next(member for member in removal.groups if any(m.name == "2.b.weight" for m in member.members))
    units = {factor: kept for factor, kept in removal.keep.units.items() if factor is not last.factor}
    decide(dense, Keep(units))
    errors = []
    for reach in ("lost", "stream"):
        work = fork(dense)
        LeastSquaresPass(reach=reach, damping=1e-3)(work, inplace=True)
        same = torch.equal(get_tensor(work, "2.b.weight"), model[2].b.weight)  # type: ignore[union-attr]
        assert same is (reach == "lost")
        errors.append(float((slim_graph_of(work)(X) - model(X)).square().sum().detach()))
    assert errors[1] < errors[0] * 0.9


def slim_graph_of(work: fx.GraphModule) -> fx.GraphModule:
    """What is left of a graph with a plan."""
    return load_pass("shrink")(work, inplace=True).graph_module


def test_a_weight_stays_where_a_fit_does_not_carry_over() -> None:
    """What the kept unit has to do with the one that goes is of the opposite sign on the tokens held out."""
    model = Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 1))
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(2))
    one = torch.ones(1, 12, 1)
    x = torch.cat([one, torch.where(torch.arange(12).view(1, 12, 1) < 9, one, -one)], -1)
    dense = discover(model, {"x": x})
    group = next(group for group in groups_of(dense) if group.name.endswith("mlp"))
    assert group.factor is not None
    decide(dense, Keep({group.factor: np.array([True, False])}))
    facts_of(dense).put(Calibration((Sample({"x": x}, x),)))
    work = fork(dense)
    LeastSquaresPass()(work, inplace=True)
    assert torch.equal(get_tensor(work, "b.weight"), model.b.weight)
    assert torch.equal(get_tensor(work, "b.bias"), model.b.bias)
    LeastSquaresPass(damping=0.1)(work, inplace=True)
    assert not torch.equal(get_tensor(work, "b.bias"), model.b.bias), "the kept unit is constant, as the bias is"


BOTH, WIDTH, DEPTH = "[mlp, head]", "[mlp, channel]", "[mlp, layer]"


def pruned(dense: fx.GraphModule, kinds: str, fit: str = "least-squares", inplace: bool = False) -> fx.GraphModule:
    """The slim graph of a model that loses half of the units of some kinds."""
    select = f"select-by-group-ratio{{kinds={kinds}, group_ratio=0.5, protect=[]}}"
    return Pipeline(f"l2{{kinds={kinds}}}, {select}, {fit}, shrink")(dense, inplace=inplace).graph_module


def calibrated(family: str, **config: Any) -> tuple[nn.Module, fx.GraphModule]:
    model = tiny(family, **{"num_hidden_layers": 2, **config})
    dense = discover(model)
    load_pass("calibrate", data=token_ids(8, 17))(dense)
    return model, dense


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        *(("llama", DEPTH), ("gpt2", WIDTH), ("mixtral", BOTH)),
        *(pytest.param("bloom", BOTH, marks=SLOW), pytest.param("qwen2_moe", "[mlp]", marks=SLOW)),
    ],
)
@torch.no_grad()
def test_a_fit_brings_the_slim_model_nearer_to_the_dense_one_and_moves_nothing_else(family: str, kinds: str) -> None:
    model, dense = calibrated(family, **({"mlp_only_layers": []} if family == "qwen2_moe" else {}))
    ids = token_ids(8, 17)
    wanted = model(input_ids=ids, use_cache=False).logits
    slims = [pruned(dense, kinds, fit) for fit in ("eliminate-dead-code", "least-squares")]
    errors = [float((slim(ids).logits - wanted).square().mean()) for slim in slims]
    assert errors[1] < errors[0]
    assert "fitted by least squares" in " ".join(facts_of(slims[1])[Notes].lines)
    kept = facts_of(slims[1])[Removed].removal.kept
    moved = {*kept, *(name.replace(".weight", ".bias") for name in kept)}
    whole = [(name, value) for name, value in weights(slims[1]) if name not in moved]
    assert (whole or kinds == WIDTH) and all(torch.equal(value, get_tensor(dense, name)) for name, value in whole)


def test_a_fit_in_place_gives_the_same() -> None:
    model, dense = calibrated("llama")
    apart = dict(weights(pruned(dense, BOTH)))
    inside = pruned(dense, BOTH, inplace=True)
    assert all(torch.allclose(value, apart[name], atol=1e-5) for name, value in weights(inside))
    assert get_tensor(inside, "model.norm.weight") is model.model.norm.weight


def test_half_precision_is_fitted_in_float32_and_stays_half() -> None:
    dense = discover(tiny("llama", num_hidden_layers=1).to(torch.bfloat16))  # type: ignore[arg-type]
    load_pass("calibrate", data=token_ids(4, 12))(dense)
    parameters = {value.dtype for _, value in weights(pruned(dense, BOTH)) if isinstance(value, nn.Parameter)}
    assert parameters == {torch.bfloat16}


def test_it_refuses_what_it_cannot_use() -> None:
    work = planned(network(), {"x": X}, 7)
    facts_of(work).drop(Calibration, by="test")
    with pytest.raises(CalibrationError, match=r"Calibration is stale.*Run calibrate first\. Pass token ids"):
        LeastSquaresPass()(work, inplace=True)
    model = network()
    dense = planned(model, {"x": X}, 7)
    with torch.no_grad():
        model.a.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"b\.weight"):
        LeastSquaresPass()(dense, inplace=True)


def moments(seed: int, tokens: int, noise: float) -> FitMoments:
    """Of tokens whose fourth input is far larger than the others, wanted through a map with noise."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 50.0])
    D = X @ torch.tensor([[1.0], [-1.0], [0.5], [0.0]]) + noise * torch.randn(tokens, 1, generator=generator)
    (found,) = StackedMoments.empty(torch.zeros(1, 1, 4)).of_each
    found.add(X, D)
    return found


@pytest.mark.parametrize("each", [False, True])
def test_the_search_finds_the_best_on_the_ladder(each: bool) -> None:
    for noise in (0.01, 3.0, 30.0):
        front, back = moments(0, 8, noise), moments(1, 8, noise)
        found = best_damping(StackedMoments((front,)), StackedMoments((back,)))
        ladder = [Damping(d, each) for d in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
        errors = [back.error(front.solve(damping)) for damping in ladder]
        assert back.error(front.solve(found)) <= min(0.0, *errors) + 1e-9


def test_one_large_input_does_not_hold_the_others_fast_and_infinite_damping_holds_all() -> None:
    front, back = moments(0, 200, 0.01), moments(1, 200, 0.01)
    assert best_damping(StackedMoments((front,)), StackedMoments((back,))).each
    change = front.solve(Damping(0.03, each=True))
    assert torch.allclose(change[:3, 0], torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), atol=0.1)
    assert float(front.solve(Damping(0.03))[:3].abs().max()) < 0.2
    still = front.solve(Damping(float("inf")))
    assert not still.any() and front.error(still) == 0


def test_matrices_with_few_tokens_are_held_back_more() -> None:
    """All by what a matrix has on average; one with none stays, and one alone is as without the others."""
    few, many, none = moments(0, 3, 0.01), moments(0, 60, 0.01), *StackedMoments.empty(torch.zeros(1, 1, 4)).of_each
    stack = StackedMoments((few, many, none))
    for each in (False, True):
        damping = Damping(1.0, each)
        change = stack.solve(damping, torch.float64)
        assert float(change[0].norm()) < float(few.solve(damping).norm())
        assert float(change[1].norm()) > float(many.solve(damping).norm())
        assert not change[2].any()
        assert torch.equal(StackedMoments((few,)).solve(damping, torch.float64)[0], few.solve(damping))
        swapped = StackedMoments((many, few, few))
        assert stack.error_on(swapped, damping) == many.error(change[0]) + few.error(change[1]) + few.error(change[2])
    other = StackedMoments((moments(3, 3, 0.01), moments(1, 60, 0.01), none))
    assert best_damping(stack, other).strength < float("inf")
    both = many.square + few.square
    stack.merge(StackedMoments((none, few, none)))
    assert torch.equal(stack.of_each[1].square, both) and stack.is_finite()


def test_a_solution_leaves_what_is_known_of_the_tokens_as_it_was() -> None:
    known = moments(0, 60, 0.01)
    square = known.square.clone()
    for each in (False, True):
        assert torch.equal(known.solve(Damping(0.3, each)), known.solve(Damping(0.3, each)))
    known.square[0, 0] = -1e9
    with pytest.raises(CalibrationError, match="is too small for inputs"):
        known.solve(Damping(0.3))
    known.square[0, 0] = square[0, 0]
    assert torch.equal(known.square, square)


def test_prunes_of_a_sweep_run_the_dense_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are bit for bit those of a fit of its own."""
    ran: list[str] = []
    call = PreciseRun.call_function

    def counted(run: PreciseRun, target: Any, args: Any, kwargs: Any) -> Any:
        ran.extend([str(target)] if type(run) is PreciseRun else [])
        return call(run, target, args, kwargs)

    monkeypatch.setattr(PreciseRun, "call_function", counted)
    dense = planned(deep(), {"input": X}, 9)
    plans = [first_units(dense, stay) for stay in (9, 5)]

    def fits() -> list[fx.GraphModule]:
        return [LeastSquaresPass()(dense).graph_module for plan in plans if decide(dense, plan)]

    alone = fits()
    before = len(ran)
    with sharing():
        for found, expected in zip(fits(), alone, strict=True):
            for (name, value), (_, other) in zip(weights(found), weights(expected), strict=True):
                assert torch.equal(value, other), name
    assert before // 2 < len(ran) - before < 0.8 * before, "only the sums of the stream are worked out again"


def test_a_fit_does_not_depend_on_how_tokens_are_divided() -> None:
    """Sums of products were in float64 and the products in float32: a constant that no damping holds amplified that."""
    generator = torch.Generator().manual_seed(0)
    X, D = 5 + torch.randn(96, 8, generator=generator), torch.randn(96, 3, generator=generator)
    whole, parts = StackedMoments.empty(torch.zeros(2, 3, 8), free=True).of_each
    whole.add(X, D)
    for rows in range(0, 96, 12):
        parts.add(X[rows : rows + 12], D[rows : rows + 12])
    fits = [one.solve(Damping(1e-3)) for one in (whole, parts)]
    assert (fits[0] - fits[1]).norm() <= 1e-10 * fits[0].norm()


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


@pytest.mark.parametrize("body", [picked, masked_out])
@torch.no_grad()
def test_experts_that_lost_other_units_are_fitted_on_those_that_they_have_left(body: Any) -> None:
    model = experts(body)
    dense = fork(planned(model, {"x": X}, 7))
    (group,) = (group for group in groups_of(dense) if group.shape == (4, 12))
    decide(dense, keep := leaving(group, 7, 0))
    assert LeastSquaresPass(damping=DAMPING)(dense, inplace=True).modified
    tokens, up, down = of_each(model, X, body)
    left = [np.flatnonzero(row) for row in keep.units[group.factor]]  # type: ignore[index]
    hidden = [(x @ w.T).relu()[:, own].double() for x, w, own in zip(tokens, up, left, strict=True)]
    ridge = (DAMPING * sum(h.square().sum(0) for h in hidden).mean() / 3).sqrt() * torch.eye(7)  # type: ignore[union-attr]
    new = get_tensor(dense, "down")
    new = new.mT if body is masked_out else new
    for e, (h, own) in enumerate(zip(hidden, left, strict=True)):
        w = down[e].double()
        wanted = ridge_solution(w[:, own], h, (tokens[e] @ up[e].T).relu().double() @ w.T, ridge)
        assert torch.allclose(new[e][:, own], wanted, atol=1e-5)
        gone = np.delete(np.arange(12), own)
        assert torch.equal(new[e][:, gone], down[e][:, gone])
    rotated = RotationPass()(dense, inplace=True)
    assert rotated.modified and slim_graph_of(rotated.graph_module)(X).isfinite().all()


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
