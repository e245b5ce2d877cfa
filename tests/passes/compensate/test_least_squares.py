"""Least squares against ridge regression by hand, and what a fit leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxprune.passes.compensate import LeastSquaresPass
from fxprune.passes.compensate.fits import Damping, FitMoments, StackedMoments, best_damping
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.data.calibration import Calibration, Sample
from fxprune.errors import CalibrationError, FxpruneError, PassError
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.graph.tensors import get_tensor, weights
from fxprune.masking.masked_run import PreciseRun
from fxprune.pipeline.contract import Pass, sharing
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal, Removed
from tests.models import tiny, token_ids
from tests.oracle import Net, decide, discover, groups_of
from tests.tiers import SLOW

X = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
DAMPING = 0.03


def network() -> Net:
    """Two linear maps around a ReLU."""
    torch.manual_seed(1)
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(6, 12), b=nn.Linear(12, 6))


def deep() -> nn.Module:
    """Three residual networks and a readout."""
    torch.manual_seed(2)
    sizes = [{"a": nn.Linear(6, 12), "b": nn.Linear(12, 6)} for _ in range(3)]
    networks = (Net(lambda m, x: x + m.b(m.a(x).relu()), **parts) for parts in sizes)
    return nn.Sequential(*networks, nn.Linear(6, 6)).eval()


def planned(model: nn.Module, inputs: dict[str, torch.Tensor], stay: int) -> fx.GraphModule:
    """The graph of a model with calibration data and a plan by which the last units of each hidden layer go."""
    dense = discover(model, inputs)
    factors = [group.factor for group in groups_of(dense) if group.factor is not None and group.size == 12]
    decide(dense, Keep({factor: np.arange(factor.size) < stay for factor in factors}))
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


def test_the_dense_model_stays_and_in_place_gives_the_same() -> None:
    model, dense = calibrated("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apart = dict(weights(pruned(dense, BOTH)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
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
    with pytest.raises(FxpruneError, match="above 0"):
        LeastSquaresPass(damping=0)
    with pytest.raises(FxpruneError, match="1 or more"):
        LeastSquaresPass(batch=0)
    with pytest.raises(PassError):
        Pipeline(["least-squares"])(discover(network(), {"x": X}))
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
    found = FitMoments.empty(torch.zeros(1, 4))
    found.add(X, D)
    return found


@pytest.mark.parametrize("each", [False, True])
def test_the_search_finds_the_best_on_the_ladder(each: bool) -> None:
    for noise in (0.01, 3.0, 30.0):
        front, back = moments(0, 8, noise), moments(1, 8, noise)
        found = best_damping(front, back)
        ladder = [Damping(d, each) for d in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
        errors = [back.error(front.solve(damping)) for damping in ladder]
        assert back.error(front.solve(found)) <= min(0.0, *errors) + 1e-9


def test_one_large_input_does_not_hold_the_others_fast_and_infinite_damping_holds_all() -> None:
    front, back = moments(0, 200, 0.01), moments(1, 200, 0.01)
    assert best_damping(front, back).each
    change = front.solve(Damping(0.03, each=True))
    assert torch.allclose(change[:3, 0], torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), atol=0.1)
    assert float(front.solve(Damping(0.03))[:3].abs().max()) < 0.2
    still = front.solve(Damping(float("inf")))
    assert not still.any() and front.error(still) == 0


def test_matrices_with_few_tokens_are_held_back_more() -> None:
    """All by what a matrix has on average; one with none stays, and one alone is as without the others."""
    few, many, none = moments(0, 3, 0.01), moments(0, 60, 0.01), FitMoments.empty(torch.zeros(1, 4))
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
    dense, plans = planned(deep(), {"input": X}, 9), []
    for stay in (9, 5):
        factors = [group.factor for group in groups_of(dense) if group.factor is not None and group.size == 12]
        plans.append(Keep({factor: np.arange(factor.size) < stay for factor in factors}))

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
    whole, parts = (FitMoments.empty(torch.zeros(3, 8), free=True) for _ in range(2))
    whole.add(X, D)
    for rows in range(0, 96, 12):
        parts.add(X[rows : rows + 12], D[rows : rows + 12])
    fits = [one.solve(Damping(1e-3)) for one in (whole, parts)]
    assert (fits[0] - fits[1]).norm() <= 1e-10 * fits[0].norm()
