"""Every criterion against plain PyTorch: gradients by autograd, slices by hand, formulas as the design has them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxprune.passes.importance import taylor
from fxprune.passes.importance.base import ImportancePass, parts_within
from torch import fx, nn

import fxprune
from fxprune.errors import CalibrationError, PassError, PlanError
from fxprune.graph.facts import facts_of
from fxprune.offload.files import offload_to
from fxprune.pipeline.contract import Track, tracking
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import REDUCTIONS, Removal, Scores
from tests.models import tiny, token_ids
from tests.oracle import discover, groups_of
from tests.tiers import tiers

Array = np.ndarray
Slices = list[tuple[str, int, list[list[int]]]]
"""For each member in order of execution its name, axis and the positions of each unit."""
Case = tuple[nn.Module, fx.GraphModule, dict[str, Slices]]

ORDERS = ("vector", "first", "second", "mix")
DEPTH, KV, REPEATS, WIDTH, FFN = 2, 3, 2, 8, 88


class TinyLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(131, 10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.down(torch.tanh(self.up(self.embed(ids)))), self.embed.weight)


def runs(units: Iterable[int], width: int) -> list[list[int]]:
    return [list(range(unit * width, (unit + 1) * width)) for unit in units]


def llama_slices() -> dict[str, Slices]:
    """The units of a grouped-query model, spelled out from the sizes in its config."""
    found: dict[str, Slices] = {}
    channels, single = runs(range(FFN), 1), runs(range(KV * REPEATS), WIDTH)
    queries, keys = runs(range(KV), REPEATS * WIDTH), runs(range(KV), WIDTH)
    members = {
        "mlp": [("mlp.gate", 0, channels), ("mlp.up", 0, channels), ("mlp.down", 1, channels)],
        "head": [(f"self_attn.{n}", int(n == "o"), queries if n in "qo" else keys) for n in "qkvo"],
        "head.2": [("self_attn.q", 0, single), ("self_attn.o", 1, single)],
    }
    for at in (f"model.layers.{layer}" for layer in range(DEPTH)):
        for group, slices in members.items():
            found[f"{at}/{group}"] = [(f"{at}.{name}_proj.weight", axis, units) for name, axis, units in slices]
    return found


def tiny_slices() -> dict[str, Slices]:
    width, hidden = runs(range(10), 1), runs(range(14), 1)
    return {
        "model/mlp": [("embed.weight", 1, width), ("up.weight", 1, width), ("down.weight", 0, width)],
        "model/mlp.2": [("up.weight", 0, hidden), ("up.bias", 0, hidden), ("down.weight", 1, hidden)],
    }


@pytest.fixture(scope="module", params=["llama", "plain"])
def case(request: pytest.FixtureRequest) -> Case:
    """A model, its graph with calibration data, and its units."""
    torch.manual_seed(0)
    if request.param == "llama":
        model: nn.Module = tiny("llama", num_hidden_layers=DEPTH)
        dense, slices = discover(model), llama_slices()
    else:
        model = TinyLM().eval()
        dense, slices = discover(model, {"ids": token_ids()}), tiny_slices()
    calibrate(dense, token_ids(3))
    return model, dense, slices


def calibrate(dense: fx.GraphModule, data: Any) -> None:
    load_pass("calibrate", data=data)(dense)


def scores_of(dense: fx.GraphModule, name: str, track: Track | None = None, **arguments: Any) -> Scores:
    with tracking(track):
        load_pass(name, **arguments)(dense)
    return facts_of(dense)[Scores]


def sample_gradients(model: nn.Module, ids: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of the next-token loss of each sample, in double precision."""
    twin = copy.deepcopy(model).double()
    named = dict(twin.named_parameters())
    for row in ids:
        out = twin(row[None])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits[0, :-1], row[1:])
        yield dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def elements(order: str, w: torch.Tensor, g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """What each weight counts, before sums."""
    return {
        "l1": w.abs(),
        "l2": w * w,
        "vector": w * g,
        "first": (w * g).abs(),
        "second": (w * h * w).abs(),
        "mix": (w * g - 0.5 * w * h * w).abs(),
    }[order]


def expected(model: nn.Module, ids: torch.Tensor, order: str, members: Slices, reduction: str) -> Array:
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    samples = list(sample_gradients(model, ids))
    rows = []
    for name, axis, units in members:
        g = torch.stack([sample[name] for sample in samples]).mean(0)
        h = torch.stack([sample[name] ** 2 for sample in samples]).mean(0)
        slices = elements(order, weights[name], g, h).movedim(axis, 0)
        per_position = slices.reshape(len(slices), -1).sum(1)
        rows.append([per_position[unit].abs().sum().item() for unit in units])
    table = np.array(rows)
    ends = {"first": 0, "last": -1}
    return table[ends[reduction]] if reduction in ends else getattr(table, reduction)(0)


@pytest.mark.parametrize("order", ["l1", "l2", *ORDERS])
def test_scores_are_what_the_formulas_say(case: Case, order: str) -> None:
    model, dense, slices = case
    shapes = {g.name: (g.outer.size, g.size) if g.outer else (g.size,) for g in groups_of(dense)}
    name, arguments = ("taylor", {"order": order}) if order in ORDERS else (order, {})
    for reduction in REDUCTIONS if order in ("l1", "mix") else ("sum",):
        scores = scores_of(dense, name, reduction=reduction, **arguments)
        assert set(scores.units) == set(slices)
        for group, members in slices.items():
            want = expected(model, token_ids(3), order, members, reduction)
            assert scores.units[group].shape == shapes[group]
            got = scores.units[group].reshape(-1)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.max())


def test_labels_that_do_not_count_change_the_loss() -> None:
    model = TinyLM().eval()
    dense = discover(model, {"ids": token_ids()})
    ids = token_ids(1, 9)[0]
    calibrate(dense, [{"ids": ids, "labels": torch.cat((ids[:5], torch.full((4,), -100)))}])
    short = scores_of(dense, "taylor").units["model/mlp.2"]
    members = tiny_slices()["model/mlp.2"]
    np.testing.assert_allclose(short, expected(model, ids[None, :5], "mix", members, "sum"), rtol=1e-4)


@pytest.mark.parametrize("order", tiers(ORDERS, "vector", "mix"))
def test_parts_give_the_scores_of_the_whole(case: Case, order: str) -> None:
    _, dense, slices = case
    steps: list[int] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        found = list(items)
        steps.append(total)
        assert len(found) == total
        return found

    once = scores_of(dense, "taylor", order=order, memory="fast", track=track)
    found = [scores_of(dense, "taylor", order=order, memory=memory, track=track) for memory in ("low", 1e-9, "auto")]
    assert steps[0] == steps[3] == 3 and steps[1] > 3, "forward and back, and forward once more for all parts but one"
    assert steps[2] == 3 or order in ("first", "mix")
    for name in slices:
        for scores in found:
            np.testing.assert_allclose(scores.units[name], once.units[name], rtol=1e-5)


class Cut(nn.Module):
    """Some of its products read what no gradient comes to, or give what nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.gate = nn.Embedding(30, 6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 30)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.up(x.detach()) * self.gate(x).sigmoid()
        return self.head(x + self.down(y).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", tiers(["first", "mix"], "mix"))
@pytest.mark.parametrize("name", tiers(["llama", "gpt2", "cut"], "gpt2", "cut"))
def test_scores_from_activations_are_those_from_gradients(
    name: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = discover(Cut().eval(), {"ids": token_ids() % 30}) if name == "cut" else discover(tiny(name))
    calibrate(dense, token_ids(3) % 30)
    taken: list[str] = []
    take = taylor._GradientSweep._record

    def watched(sweep: taylor._GradientSweep, product: Any, output: torch.Tensor) -> torch.Tensor:
        taken.append(product.name)
        return take(sweep, product, output)

    monkeypatch.setattr(taylor._GradientSweep, "_record", watched)
    monkeypatch.setattr(taylor, "_BLOCK", 100)
    monkeypatch.setattr(taylor, "count_tokens", lambda _: 10**9)
    want = scores_of(dense, "taylor", order=order, memory="fast")
    assert not taken
    monkeypatch.setattr(taylor, "count_tokens", lambda _: 1)
    for memory in ("fast", "low", 1e-9):
        taken.clear()
        found = scores_of(dense, "taylor", order=order, memory=memory)
        assert len(set(taken)) >= 3 and taken.count(taken[0]) == 3
        for group, row in want.units.items():
            np.testing.assert_allclose(found.units[group], row, rtol=1e-5, atol=1e-6 * row.max())


class TokensFirst(nn.Module):
    """Its products read tokens before samples: in a batch their rows are not those of one sample after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(30, 6),
            nn.Linear(6, 8),
            nn.Linear(8, 6),
            nn.Linear(6, 30),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens, samples = ids.shape[1], ids.shape[0]
        rows = self.embed(ids).transpose(0, 1).reshape(tokens * samples, 6)
        x = rows + self.down(self.up(rows).relu())
        return self.head(x).reshape(tokens, samples, 30).transpose(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    tiers(
        [
            ("llama", "vector", True),
            ("qwen2", "second", True),  # with biases
            ("qwen3", "second", True),
            ("phi3", "second", True),
            ("gpt2", "vector", True),  # with biases, and samples and tokens in one axis
            ("tokens first", "second", False),
            ("mixtral", "second", False),  # whose experts read some rows
            ("llama", "mix", False),
        ],
        ("qwen2", "second", True),
        ("gpt2", "vector", True),
        ("tokens first", "second", False),
        ("mixtral", "second", False),
    ),
)
def test_a_batch_gives_the_scores_of_its_samples_one_by_one(model: tuple[str, str, bool]) -> None:
    name, order, together = model
    torch.manual_seed(0)
    if name == "tokens first":
        dense = discover(TokensFirst().eval(), {"ids": token_ids() % 30})
    else:
        dense = discover(tiny(name))
    with torch.no_grad():
        for bias in (p for n, p in dense.named_parameters() if n.endswith("bias")):
            bias.normal_(std=0.1)
    short = [row[None, :5] for row in token_ids(2)]
    calibrate(dense, [row % 30 for row in (*token_ids(3).split(1), *short)])
    before = {n: p.detach().clone() for n, p in dense.named_parameters()}
    totals: list[int] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        totals.append(total)
        return items

    want = scores_of(dense, "taylor", order=order, memory="fast")
    for memory in ("fast", 1e-9):
        found = scores_of(dense, "taylor", order=order, memory=memory, batch=2, track=track)
        for group, row in want.units.items():
            np.testing.assert_allclose(found.units[group], row, rtol=2e-5, atol=1e-6 * row.max())
    assert totals[0] == (3 if together else 5), "two of three samples, one, and two shorter ones"
    assert all(torch.equal(p, before[n]) for n, p in dense.named_parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_in_bfloat16_scores_are_close_and_weights_untouched(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taylor, "_CACHED", 300)  # some rows at a time
    torch.manual_seed(0)
    dense = discover(tiny("qwen2"))
    calibrate(dense, token_ids(4))
    before = {n: p.detach().clone() for n, p in dense.named_parameters()}
    for name, arguments in (("taylor", {"order": order}), ("wanda", {"readers_only": True})):
        want = scores_of(dense, name, **arguments)
        for memory in ({"memory": "fast"}, {"memory": 1e-9}, {"batch": 2}) if name == "taylor" else ({},):
            found = scores_of(dense, name, precision="bf16", **arguments, **memory)
            for group, row in want.units.items():
                np.testing.assert_allclose(found.units[group], row, rtol=0.1, atol=0.05 * row.mean())
            assert any((found.units[group] != row).any() for group, row in want.units.items())
    assert all(torch.equal(p, before[n]) for n, p in dense.named_parameters())


@pytest.mark.parametrize(("order", "memory"), [("mix", "fast"), ("first", "low"), ("second", "fast")])
def test_units_that_no_loss_reads_score_zero(order: str, memory: str) -> None:
    """As those of a tower whose output the loss leaves out."""

    class Aside(Cut):
        def __init__(self) -> None:
            super().__init__()
            self.beside, self.back = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            x = self.embed(ids)
            return self.head(self.down(self.up(x))), self.back(self.beside(x).tanh())

    dense = discover(Aside().eval(), {"ids": token_ids() % 30})
    calibrate(dense, token_ids(3) % 30)
    found = scores_of(dense, "taylor", order=order, memory=memory)
    aside = [row for group, row in found.units.items() if len(row) == 12]
    assert len(aside) == 1 and not aside[0].any()
    assert all(row.any() for row in found.units.values() if len(row) != 12)


def test_a_graph_that_writes_to_values_has_no_product_to_record() -> None:
    class Writes(Cut):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            y = self.up(x)
            y[:, 0] = 0
            return self.head(self.down(y))  # type: ignore[no-any-return]

    for kind, there in ((Cut, True), (Writes, False)):
        dense = discover(kind().eval(), {"ids": token_ids() % 30})
        assert bool(taylor.recordable_products(dense)) is there


@pytest.mark.slow
def test_with_little_memory_parts_are_small_while_what_is_between_them_is_little() -> None:
    dense = discover(tiny("llama", num_hidden_layers=12))
    costs = {name: 4.0 * tensor.numel() for name, tensor in dense.named_parameters()}
    few, many = (parts_within("low", dense, costs, tokens) for tokens in (1, 10**6))
    assert len(few) > len(many) > 1
    assert [len(parts_within(memory, dense, costs, 1)) for memory in ("fast", 0.9)] == [1, 2]


def test_the_callers_gradients_and_flags_stay_as_they_are() -> None:
    model = tiny("llama", num_hidden_layers=1)
    dense = discover(model)
    calibrate(dense, token_ids(2))
    parameters = dict(model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = {name: (p.grad, p.requires_grad, p.detach().clone()) for name, p in parameters.items()}
    scores_of(dense, "taylor")
    for name, (gradient, flag, value) in before.items():
        parameter = parameters[name]
        assert parameter.grad is gradient and parameter.requires_grad is flag
        assert gradient is None or bool((gradient == list(parameters).index(name)).all())
        assert torch.equal(parameter, value)


def test_the_same_seed_gives_the_same_random_scores(case: Case) -> None:
    _, dense, slices = case
    first, again, other = (scores_of(dense, "random", seed=seed).units for seed in (0, 0, 1))
    for group in slices:
        assert (first[group] == again[group]).all() and (first[group] != other[group]).any()
        assert ((first[group] >= 0) & (first[group] < 1)).all()


def test_only_the_kinds_asked_for_are_scored() -> None:
    dense = discover(tiny("llama", num_hidden_layers=1))
    kinds = {group.name: group.kind for group in groups_of(dense)}
    scores = scores_of(dense, "l1", kinds=("channel", "layer"))
    assert sorted(kinds[name] for name in scores.units) == ["channel", "layer"]
    layer = next(group for group in groups_of(dense) if group.kind == "layer")
    sizes = {m.name: dense.get_parameter(m.name).abs().sum().item() for m in layer.members}
    np.testing.assert_allclose(scores.units[layer.name], [sum(sizes.values())], rtol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    class NothingPass(ImportancePass):
        name = "nothing"

    model = TinyLM()
    dense = discover(model, {"ids": token_ids()})
    with pytest.raises(PassError, match=r"scores nothing.*Define `positions`, or `score`"):
        NothingPass()(dense)
    calibrate(dense, token_ids(2))
    with torch.no_grad():
        model.up.bias[0] = float("nan")
    with pytest.raises(CalibrationError, match="the loss is nan"):
        load_pass("taylor")(dense)
    meta = discover(TinyLM().to("meta"), {"ids": token_ids()})
    calibrate(meta, token_ids(2))
    with pytest.raises(PassError, match="meta"):
        load_pass("taylor")(meta)


def test_scores_of_one_run_serve_any_ratio(tmp_path: Path) -> None:
    dense = discover(tiny("llama", num_hidden_layers=2))
    small = scores_of(dense, "l2")
    small.save(tmp_path / "scores.safetensors")
    plans = {}
    for ratio in (0.1, 0.3):
        load_pass("select-by-ratio", ratio=ratio, protect=())(dense)
        plans[ratio] = facts_of(dense)[Removal].plan
    assert plans[0.1] != plans[0.3]
    for given in ({"scores": small}, {"file": tmp_path / "scores.safetensors"}):
        loaded = scores_of(dense, "load-scores", **given)
        load_pass("select-by-ratio", ratio=0.3, protect=())(dense)
        removal = facts_of(dense)[Removal]
        assert removal.plan == plans[0.3] and removal.scores is loaded and loaded.source == "l2"
    with pytest.raises(PlanError, match="Use scores of this model"):
        load_pass("load-scores", scores=Scores({next(iter(small.units)): np.ones(5)}))(dense)
    for arguments in ({}, {"scores": "l2"}, {"file": str(tmp_path / "none")}):
        with pytest.raises(PlanError):
            fxprune.Pipeline([load_pass("load-scores", **arguments)])(dense)


OPTIONS: dict[str, Any] = {"recipe": "llm-pruner", "protect": (), "ratio": 0.2}


def criterion(give: Any, method: str = "positions") -> ImportancePass:
    """A criterion of one's own."""

    class OwnPass(ImportancePass):
        """A criterion of one's own."""

        name = "own"

    setattr(OwnPass, method, lambda self, graph_module, wanted: give(graph_module, wanted))
    return OwnPass()


def column_sums(graph_module: fx.GraphModule, wanted: Any, factor: float = 1.0) -> dict[tuple[str, int], torch.Tensor]:
    """Scores that keep their gradient."""
    found = {}
    for name, axis in wanted:
        square = fxprune.get_tensor(graph_module, name).float() ** 2 * factor
        found[name, axis] = square.sum([i for i in range(square.dim()) if i != axis])
    return found


def given_as(graph_module: fx.GraphModule, wanted: Any, form: Any) -> dict[Any, Any]:
    """Scores of the right number in another form than tensors of real numbers."""
    return {place: form(row.detach()) for place, row in column_sums(graph_module, wanted).items()}


def test_a_criterion_need_not_detach_its_scores() -> None:
    model = tiny("llama")
    plan = fxprune.prune(model, importance=criterion(column_sums), **OPTIONS).plan
    assert plan == fxprune.prune(model, importance="l2", **OPTIONS).plan


@pytest.mark.parametrize(
    ("method", "give", "text"),
    [
        ("positions", lambda gm, wanted: column_sums(gm, wanted, float("nan")), "its scores are not all finite"),
        ("positions", lambda gm, wanted: [1.0], r"`positions` gave \[1.0\]\. Return a dict of tensors"),
        ("positions", lambda gm, wanted: given_as(gm, wanted, torch.Tensor.numpy), "array of shape .* not a tensor of"),
        ("positions", lambda gm, wanted: given_as(gm, wanted, lambda row: row + 1j), "a torch.complex64 tensor"),
        ("positions", lambda gm, wanted: {name: torch.ones(1) for name, _ in wanted}, "gave None for"),
        ("positions", lambda gm, wanted: dict.fromkeys(wanted, torch.ones(3)), "tensor of shape"),
        ("positions", lambda gm, wanted: dict.fromkeys(wanted, 1.0), "gave 1.0 for"),
        ("score", lambda gm, groups: None, "`score` gave None"),
        ("score", lambda gm, groups: Scores({"nothing": np.ones(1)}), "no such group"),
    ],
)
def test_scores_that_are_none_are_refused_by_name(method: str, give: Any, text: str) -> None:
    with pytest.raises(PassError, match=text) as error:
        fxprune.prune(tiny("llama"), importance=criterion(give, method), **OPTIONS)
    assert "own" in str(error.value) and "defect" not in str(error.value)


def test_a_criterion_that_runs_backward_leaves_no_gradient() -> None:
    model = tiny("llama")

    def give(graph_module: fx.GraphModule, wanted: Any) -> Any:
        graph_module(**{"input_ids": token_ids(1)})["logits"].sum().backward()
        return column_sums(graph_module, wanted)

    fxprune.prune(model, importance=criterion(give), **OPTIONS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_residual_width_is_scored_on_fewer_samples_beside_other_kinds(tmp_path: Path) -> None:
    work = discover(tiny("llama"))
    calibrate(work, token_ids(6, 8))
    kinds = ("mlp", "channel")

    def scores(**arguments: Any) -> Mapping[str, Any]:
        return scores_of(work, "taylor", order="second", **arguments).units

    both, few = scores(kinds=kinds, samples=6, channel_samples=2), scores(kinds=("channel",), samples=2)
    alone, every = scores(kinds=("channel",), samples=6, channel_samples=2), scores(kinds=kinds, samples=6)
    (wide,) = few
    assert list(both) == list(every)
    assert all(np.array_equal(both[name], every[name]) for name in both if name != wide)
    np.testing.assert_array_equal(both[wide], few[wide])
    np.testing.assert_array_equal(alone[wide], every[wide])
    with offload_to(tmp_path):
        np.testing.assert_allclose(scores(kinds=kinds, samples=6, channel_samples=2)[wide], few[wide], rtol=1e-5)
    step = load_pass("taylor", kinds=kinds, channel_samples=2)
    assert step.cost(6).runs == 24 and load_pass("taylor", channel_samples=2).cost(6).runs == 18
