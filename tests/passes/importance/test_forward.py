"""Criteria by what a model computes, against plain PyTorch: inputs by hooks, formulas written out, greedy by trial."""

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fxprune.passes.importance.reconstruction import FittedProduct, increasing_costs, removal_costs
from fxprune.passes.importance.taylor import greedy_costs
from torch import fx, nn

from fxprune.data.calibration import Calibration, Sample
from fxprune.errors import CalibrationError, PassError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.contract import tracking
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Scores
from tests.models import tiny, token_ids
from tests.oracle import Net, discover, groups_of

KV, REPEATS, WIDTH, FFN = 3, 2, 8, 88
IDS = token_ids(5, 9)

Case = tuple[nn.Module, fx.GraphModule]


@pytest.fixture(scope="module")
def case() -> Case:
    """A grouped-query model of one layer, and its graph with calibration data."""
    model = tiny("llama", num_hidden_layers=1)
    dense = discover(model)
    load_pass("calibrate", data=IDS)(dense)
    return model, dense


def scores_of(dense: fx.GraphModule, name: str, **arguments: Any) -> dict[str, np.ndarray]:
    load_pass(name, **arguments)(dense)
    return dict(facts_of(dense)[Scores].units)


def inputs_of(model: nn.Module, ids: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    """What each module takes in, as ``(tokens, in)``."""
    taken: dict[nn.Module, torch.Tensor] = {}

    def take(module: nn.Module, x: Any) -> None:
        taken[module] = x[0].flatten(0, -2).double()

    hooks = [module.register_forward_pre_hook(take) for module in modules]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [taken[module] for module in modules]


def by_head(row: torch.Tensor, heads: int = KV * REPEATS) -> np.ndarray:
    return row.reshape(heads, -1).sum(1).numpy()


def test_wanda_is_magnitude_times_the_norm_of_the_input(case: Case) -> None:
    model, dense = case
    layer = model.model.layers[0]
    mlp, attention = layer.mlp, layer.self_attn
    into_mlp, into_down, into_attention, into_o = inputs_of(
        model, IDS, mlp.up_proj, mlp.down_proj, attention.q_proj, attention.o_proj
    )
    reads = [(mlp, "gate up", into_mlp), (mlp, "down", into_down)]
    reads += [(attention, "q k v", into_attention), (attention, "o", into_o)]
    elements = {
        name: part.get_parameter(f"{name}_proj.weight").detach().double().abs() * x.square().mean(0).sqrt()
        for part, names, x in reads
        for name in names.split()
    }
    found = scores_of(dense, "wanda", batch=2)
    channels = elements["gate"].sum(1) + elements["up"].sum(1) + elements["down"].sum(0)
    np.testing.assert_allclose(found["model.layers.0/mlp"], channels.numpy(), rtol=1e-5)
    heads = by_head(elements["q"].sum(1) + elements["o"].sum(0), KV)
    heads += by_head(elements["k"].sum(1), KV) + by_head(elements["v"].sum(1), KV)
    np.testing.assert_allclose(found["model.layers.0/head"], heads, rtol=1e-5)
    found = scores_of(dense, "wanda", batch=2, readers_only=True, kinds=("mlp", "head", "layer"))
    np.testing.assert_allclose(found["model.layers.0/mlp"], elements["down"].sum(0).numpy(), rtol=1e-5)
    read = by_head(elements["o"].sum(0), KV)
    np.testing.assert_allclose(found["model.layers.0/head"], read, rtol=1e-5)
    assert "model.layers.0/layer" in found, "nothing reads a layer, so all of its weights count"


def test_flap_is_the_variance_of_the_input_times_its_column(case: Case) -> None:
    model, dense = case
    layer = model.model.layers[0]
    into_down, into_o = inputs_of(model, IDS, layer.mlp.down_proj, layer.self_attn.o_proj)
    found = scores_of(dense, "flap", batch=2)
    down = into_down.var(0) * layer.mlp.down_proj.weight.detach().double().square().sum(0)
    np.testing.assert_allclose(found["model.layers.0/mlp"], down.numpy(), rtol=1e-4)
    heads = by_head(into_o.var(0) * layer.self_attn.o_proj.weight.detach().double().square().sum(0))
    np.testing.assert_allclose(found["model.layers.0/head"], heads.reshape(KV, REPEATS).sum(1), rtol=1e-4)
    np.testing.assert_allclose(found["model.layers.0/head.2"], heads.reshape(KV, REPEATS), rtol=1e-4)
    standard = scores_of(dense, "flap", standardise=True)["model.layers.0/mlp"]
    assert abs(standard.mean()) < 1e-9 and standard.std() == pytest.approx(1)
    assert (standard.argsort() == found["model.layers.0/mlp"].argsort()).all()


def test_what_adds_up_nowhere_is_refused(case: Case) -> None:
    _, dense = case
    refusal = r"of the kind 'head_dim', has no weight that sums over its units.*Leave that kind out"
    for name in ("flap", "reconstruction", "fisher"):
        with pytest.raises(PassError, match=refusal):
            load_pass(name, kinds="head_dim")(dense)
    for name in ("block-influence", "reap"):
        with pytest.raises(PassError, match="of the kind 'mlp', has no"):
            load_pass(name, kinds="mlp")(dense)


def test_a_layer_is_worth_how_much_it_turns_the_stream(case: Case) -> None:
    model, dense = case
    with torch.no_grad():
        first = model.model.embed_tokens(IDS).flatten(0, 1).double()
    (last,) = inputs_of(model, IDS, model.model.norm)
    cosines = torch.cosine_similarity(first, last, dim=-1)
    found = scores_of(dense, "block-influence", batch=2)
    assert list(found) == ["model.layers.0/layer"]
    np.testing.assert_allclose(found["model.layers.0/layer"], [1 - float(cosines.mean())], rtol=1e-6)


def mixture() -> tuple[fx.GraphModule, Any, torch.Tensor]:
    """The graph of five stacked experts with calibration data, the block that holds them, and what it takes in."""
    model = tiny("mixtral", num_hidden_layers=1)
    dense = discover(model)
    load_pass("calibrate", data=IDS)(dense)
    block = model.model.layers[0].mlp
    return dense, block, *inputs_of(model, IDS, block)


def test_an_expert_is_worth_what_it_adds_to_its_tokens() -> None:
    dense, block, x = mixture()
    experts, gate = block.experts, block.gate
    probabilities = (x @ gate.weight.detach().double().T).softmax(-1)
    top, chosen = probabilities.topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    total, count = np.zeros(5), np.zeros(5)
    for token in range(len(x)):
        for weight, expert in zip(top[token], chosen[token].tolist(), strict=True):
            up = experts.gate_up_proj[expert].detach().double() @ x[token]
            hidden = nn.functional.silu(up[: len(up) // 2]) * up[len(up) // 2 :]
            total[expert] += float(weight * (experts.down_proj[expert].detach().double() @ hidden).norm())
            count[expert] += 1
    (found,) = scores_of(dense, "reap", batch=2).values()
    np.testing.assert_allclose(found, total / np.maximum(count, 1), rtol=1e-4)


def test_inputs_of_stacked_experts_are_those_of_the_tokens_that_reach_them() -> None:
    """They were those of all experts, so that a channel was as large as the same one of other experts."""
    dense, block, x = mixture()
    chosen = (x @ block.gate.weight.detach().double().T).topk(2, dim=-1).indices
    gate_up, down = (getattr(block.experts, name).detach().double() for name in ("gate_up_proj", "down_proj"))
    wanda, flap = torch.zeros(5, FFN), torch.zeros(5, FFN)
    for expert in range(5):
        own = x[(chosen == expert).any(-1)]
        gate, up = (own @ gate_up[expert].T).chunk(2, -1)
        hidden = nn.functional.silu(gate) * up
        writes = gate_up[expert].abs() * own.square().mean(0).sqrt()
        reads = down[expert].abs().sum(0) * hidden.square().mean(0).sqrt()
        wanda[expert] = sum(writes.sum(1).split(FFN)) + reads
        flap[expert] = hidden.var(0) * down[expert].square().sum(0)
    for name, expected in (("wanda", wanda), ("flap", flap)):
        found = scores_of(dense, name, batch=2, kinds="mlp")["model.layers.0/mlp"]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_inputs_of_experts_side_by_side_are_apart_and_of_both_uses_of_a_weight_together() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(4, 6, 10), torch.randn(4, 10, 6)

    def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.bmm(torch.bmm(y, m.up).relu(), m.down).sum(0) for y in (x, x * 2))

    model = Net(twice, up=nn.Parameter(up), down=nn.Parameter(down))
    x = torch.randn(4, 7, 6)
    dense = discover(model, {"x": x})
    facts_of(dense).put(Calibration((Sample({"x": x}, torch.zeros(1, 7)),)))
    (group,) = (g for g in groups_of(dense) if g.size == 10)
    found = scores_of(dense, "wanda", readers_only=True, kinds=group.kind)[group.name]
    hidden = torch.cat([torch.bmm(y, up).relu() for y in (x, x * 2)], dim=1).double()
    expected = (hidden.square().mean(1).sqrt() * down.abs().sum(2)).sum(0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_experts_side_by_side_count_the_tokens_that_reach_them() -> None:
    torch.manual_seed(0)

    def given_by_experts(m: Any, x: torch.Tensor) -> torch.Tensor:
        gates = (x @ m.router).softmax(-1)
        gates = gates * (gates > 0.25)
        hidden = torch.einsum("th,ehf->etf", x, m.up).relu()
        return torch.einsum("etf,efh->eth", hidden, m.down) * gates.T[..., None]

    parts = {"router": torch.randn(6, 4), "up": torch.randn(4, 6, 10), "down": torch.randn(4, 10, 6)}
    model = Net(
        lambda m, x: given_by_experts(m, x).sum(0), **{name: nn.Parameter(part) for name, part in parts.items()}
    )
    x = torch.randn(7, 6)
    dense = discover(model, {"x": x})
    group = next(g for g in groups_of(dense) if g.kind == "expert")
    facts_of(dense).put(Calibration((Sample({"x": x}, torch.zeros(1, 7)),)))
    norms = given_by_experts(model, x).detach().norm(dim=-1)
    expected = [float(row[row > 0].mean()) if (row > 0).any() else 0.0 for row in norms]
    np.testing.assert_allclose(scores_of(dense, "reap")[group.name], expected, rtol=1e-4)


def fit_error(X: torch.Tensor, B: torch.Tensor, ridge: float, kept: list[int]) -> float:
    """The least of ``|X B - X_K C|^2 + ridge |B' - C|^2`` over ``C``, where ``B'`` is ``B`` at the kept inputs."""
    stacked = torch.cat((X, ridge**0.5 * torch.eye(X.shape[1], dtype=X.dtype)))
    solved = torch.linalg.lstsq(stacked[:, kept], stacked @ B).solution
    return float((stacked @ B - stacked[:, kept] @ solved).square().sum())


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 1, 3, 1, 2]])
def test_units_go_in_the_order_that_trying_each_would_give(sizes: list[int]) -> None:
    unit = np.repeat(np.arange(len(sizes)), sizes)
    X, B = torch.randn(40, len(unit)).double(), torch.randn(len(unit), 4).double()
    X[:, 3] = X[:, 1] + 0.1 * X[:, 3]
    ridge = 0.1 * float(X.square().sum(0).mean())
    left, before, costs, order = list(range(len(sizes))), 0.0, [], []
    while left:
        errors = [fit_error(X, B, ridge, [i for i, u in enumerate(unit) if u in left and u != one]) for one in left]
        best = int(np.argmin(errors))
        costs.append(errors[best] - before)
        before = errors[best]
        order.append(left.pop(best))
    scores = removal_costs([FittedProduct.of(X.T @ X, B, unit, len(sizes), 0.1)], steps=len(sizes))
    assert scores.argsort().tolist() == order
    np.testing.assert_allclose(scores[order], np.maximum.accumulate(costs), rtol=1e-5)


def test_large_units_cost_the_same_on_two_threads() -> None:
    """Batched LU factors of such blocks fail, or never end, on two threads in torch 2.13 on some CPUs."""
    X, B = torch.randn(2000, 576, dtype=torch.float64), torch.randn(576, 20, dtype=torch.float64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fitted = FittedProduct.of(X.T @ X, B, np.repeat(np.arange(3), 192), 3, 0.1)
            costs = [fitted.costs()]
            fitted.remove(np.array([0]))
            found.append(torch.cat((*costs, fitted.costs())))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1])
    assert bool((found[0][[0, 1, 2, 4, 5]] > 0).all())


def test_reconstruction_looks_at_consumers_and_needs_no_more_memory_than_it_may_have(case: Case) -> None:
    model, dense = case
    layer = model.model.layers[0]
    into_down, into_o = inputs_of(model, IDS, layer.mlp.down_proj, layer.self_attn.o_proj)
    track = MagicMock(side_effect=lambda items, what, total: items)
    with tracking(track):
        found = scores_of(dense, "reconstruction", steps=1000, memory=10.0, ridge=0.2)
        often = scores_of(dense, "reconstruction", steps=1000, memory=1e-9, ridge=0.2, batch=2)
    assert [call.args[2] for call in track.mock_calls] == [1, 3, 3, 3]
    for name, x, consumer, shape in (
        ("mlp", into_down, layer.mlp.down_proj, (FFN,)),
        ("head", into_o, layer.self_attn.o_proj, (KV,)),
        ("head.2", into_o, layer.self_attn.o_proj, (KV, REPEATS)),
    ):
        units = int(np.prod(shape))
        unit = np.repeat(np.arange(units), x.shape[1] // units)
        fitted = FittedProduct.of(x.T @ x, consumer.weight.detach().T, unit, units, 0.2)
        expected = removal_costs([fitted], 1000).reshape(shape) / len(x)
        np.testing.assert_allclose(found[f"model.layers.0/{name}"], expected, rtol=1e-3)
        np.testing.assert_allclose(often[f"model.layers.0/{name}"], expected, rtol=1e-3)


def test_inputs_that_are_all_zero_go_first_and_cost_nothing() -> None:
    X, B = torch.randn(20, 4), torch.randn(4, 3)
    X[:, 2] = 0
    scores = removal_costs([FittedProduct.of(X.T @ X, B, np.arange(4), 4, 0.0001)], steps=4)
    assert scores.argmin() == 2


def gate_gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of each sample's loss by gates of the channels and of the query heads, by hooks."""
    layer = model.model.layers[0]
    rows = []
    for row in ids:
        gates = [torch.ones(FFN, requires_grad=True), torch.ones(KV * REPEATS, requires_grad=True)]
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, g=gates: (x[0] * g[0],)),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, x, g=gates: (x[0] * g[1].repeat_interleave(WIDTH),)
            ),
        ]
        logits = model(input_ids=row[None]).logits
        rows.append(torch.autograd.grad(nn.functional.cross_entropy(logits[0, :-1], row[1:]), gates))
        for hook in hooks:
            hook.remove()
    channels, heads = zip(*rows, strict=True)
    return torch.stack(channels), torch.stack(heads)


@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
def test_fisher_is_greedy_under_interactions(case: Case, shrinkage: float) -> None:
    model, dense = case
    channels, heads = gate_gradients(model, IDS)
    found = scores_of(dense, "fisher", steps=10_000, shrinkage=shrinkage)
    both = torch.cat((heads.reshape(-1, KV, REPEATS).sum(2), heads), 1)
    parts = (found["model.layers.0/head"], found["model.layers.0/head.2"].reshape(-1))
    for rows, scores in ((channels, found["model.layers.0/mlp"]), (both, np.concatenate(parts))):
        np.testing.assert_allclose(scores, by_trial(rows.double().numpy(), shrinkage), rtol=1e-2, atol=1e-12)
    gradient = next(model.parameters()).grad
    assert gradient is None


def by_trial(rows: np.ndarray, shrinkage: float) -> np.ndarray:
    """Greedy selection with the whole matrix: in each turn every unit is tried beside those that went."""
    F = rows.T @ rows / len(rows)
    gone: list[int] = []
    costs: list[float] = []
    while len(gone) < len(F):
        left = [u for u in range(len(F)) if u not in gone]
        trials = {u: 0.5 * F[u, u] + (1 - shrinkage) * max(F[u, gone].sum(), 0) for u in left}
        best = min(trials, key=lambda u: trials[u])
        costs.append(trials[best])
        gone.append(best)
    scores = np.zeros(len(F))
    scores[gone] = increasing_costs(np.asarray(costs), 1e-9 * float(np.diag(F).mean()) / 2)
    return scores


def test_units_that_happen_to_cancel_are_not_taken_for_it() -> None:
    """A unit of thirty times the gradient, with the other sign, went before most of those it made up for."""
    rows = torch.ones(4, 1) @ torch.tensor([[0.1] * 100 + [-3.0]])
    assert greedy_costs(rows, 0.0, 101).argmax() == 100


def test_what_grows_keeps_the_order_and_tells_all_apart() -> None:
    found = increasing_costs(np.array([1.0, 3.0, 2.0, 2.0, 5.0]))
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(found, [1, 3, 3, 3, 5], rtol=1e-5)
    assert (increasing_costs(np.array([-1.0, -2.0, 0.0]), 0.1) >= 0.1).all()


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny("llama", num_hidden_layers=1)
    dense = discover(model)
    load_pass("calibrate", data=IDS)(dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    for name in ("wanda", "flap", "reconstruction", "fisher"):
        with pytest.raises(CalibrationError, match=r"down_proj.weight|the loss is nan"):
            load_pass(name, kinds="mlp")(dense)
