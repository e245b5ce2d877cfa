"""Options at their limits and in combinations: a refusal with its reason, or a prune that is exact and as asked for."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import FxpruneError
from fxprune.graph.facts import facts_of
from fxprune.removal.plan import keep_of
from tests.models import token_ids
from tests.oracle import zeroed
from tests.probes.check import equal, state_of
from tests.remembered import grouped, model_of, pruned
from tests.tiers import tiers

Options = dict[str, Any]
IDS = token_ids(2, 8)


class Skipped(nn.Module):
    def forward(self, h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return h


@cache
def dense() -> Any:
    """The graph of the model that all are about."""
    return grouped("llama", num_hidden_layers=2)


def options(**given: Any) -> Options:
    return {"importance": "l2", "protect": (), "compensate": "none", "tune": "none", **given}


def outcome(given: Options, calibration: Any = None) -> str:
    """Prune; return the refusal, or nothing if the result is what was asked for."""
    model = model_of(dense())
    before = state_of(model)
    try:
        result = pruned("llama", calibration, changes={"num_hidden_layers": 2}, **given)
    except FxpruneError as error:
        assert error.what and error.where and error.remedy and "\n" not in error.what, repr(error)
        assert "defect of fxprune" not in str(error), error
        return str(error)
    finally:
        assert equal(state_of(model), before), "the model changed"
    plan = result.plan
    with torch.no_grad():
        got = result(input_ids=IDS).logits
        if not result.report.renormalised and given["compensate"] == given["tune"] == "none":
            by_hand = zeroed(model, plan)
            for path in plan.removed_blocks:
                by_hand.set_submodule(path, Skipped())
            assert (by_hand(IDS).logits - got).abs().max() < 1e-4, "not what zeroing by hand gives"
        if result.model is not None:
            assert (result.model(IDS).logits - got).abs().max() < 1e-4, "the model is not the graph"
    check_asked_for(given, plan)
    return ""


def check_asked_for(given: Options, plan: fxprune.Plan) -> None:
    """No other kind went, no protected block, no width is what it must not be."""
    ratio, protect = given.get("ratio", 0.2), given.get("protect") or (0, 0)
    kinds = given.get("kinds") or (ratio if isinstance(ratio, dict) else None)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    facts = facts_of(dense())
    keep = keep_of(facts[Dependencies].axes, facts[Groups].all, plan)
    left = [(group, keep.count(group.factor)) for group in facts[Groups].all if group.factor in keep.units]
    gone = [(group, number) for group, number in left if number < group.size]
    for group, number in gone:
        assert kinds is None or group.kind in [kind.removeprefix("exact-") for kind in kinds], group.name
        assert number >= 1
        assert not (protect == (1, 0) and (group.block or "").endswith(".0")), group.name
        assert not (protect == (0, 1) and (group.block or "").endswith(".1")), group.name
        multiple = given.get("round_to", 1)
        multiple = multiple.get(group.kind, 1) if isinstance(multiple, dict) else multiple
        assert group.kind != "mlp" or number % multiple == 0, (group.name, number)
        assert group.kind not in ("mlp", "head") or number % given.get("tensor_parallel", 1) == 0, group.name
    if given.get("uniform"):
        assert len({(group.kind, number) for group, number in gone}) == len({group.kind for group, _ in gone})
    assert kinds is None or "layer" in kinds or not plan.removed_blocks


def each(name: str, *values: Any, **more: Any) -> list[Options]:
    """Options of which one has each of these values in turn."""
    return [options(**{name: value, **more}) for value in values]


MOST = ["mlp", "head", "head_dim", "channel", "layer"]
RECIPE = "find-groups, l1, select-by-ratio{ratio=0.2}"

TAKEN: list[Options] = [
    *each("ratio", 0, 0.0, 1e-12, 0.001, 0.01, 0.5),
    *each("ratio", {"mlp": 0, "head": 0}, {"mlp": 0.5, "head": 0}, {"head": 0.5}, {"mlp": 0.99, "head": 0.01}),
    *each("ratio", {"layer": 0.5}, {"layer": 0.5, "mlp": 0.5}),
    options(ratio={"mlp": 0.3}, kinds="mlp"),
    *each("kinds", "mlp", "head", "head_dim", "channel", "layer", "exact-mlp", "exact-channel", ratio=0.1),
    *each("kinds", "mlp", "channel", ratio=0.4),
    *each("kinds", ["mlp", "mlp"], ["mlp", "exact-mlp"], MOST),
    options(kinds=MOST, ratio=0.6),
    *each("protect", (0, 0), (1, 0), (0, 1), (0.5, 0), ratio=0.1),
    *each("round_to", 2, 3, 4, 8, 16, {"mlp": 8}, {"head": 2}, {"layer": 2}, ratio=0.1),
    *each("round_to", 8, uniform=True, ratio=0.15),
    *each("round_to", 8, ranking="global", ratio=0.15),
    *each("round_to", 8, tensor_parallel=3, ratio=0.15, kinds="mlp"),
    *each("kinds", "mlp", "head", ["mlp", "head"], ["layer", "mlp"], uniform=True, ratio=0.05),
    *each("kinds", "mlp", ["mlp", "head"], ["layer", "mlp"], uniform=True, ratio=0.3),
    *each("tensor_parallel", 1, 2, 3, 4, 7, ratio=0.1),
    *each("tensor_parallel", 2, uniform=True, ratio=0.1),
    *each("kinds", "mlp", ["mlp", "head"], ["layer"], ranking="local"),
    *each("kinds", "mlp", ["mlp", "head"], ["layer"], ranking="global"),
    *each("reduction", "sum", "prod", "max", "mean", "first", "last"),
    *each("importance", "l1", "random", "random{seed=7}"),
    *each("ratio", 0.1, 0.7, norm="sliced", kinds="channel"),
    *each("ratio", 0.1, 0.7, norm="masked", kinds="channel"),
    *each("seed", 0, 1, 2**32, 2**63 - 1, importance="random"),
    *each("budget", "params", "macs", "kv", "bytes@q8_0", "bytes@f32"),
    *each("ratio", 0.3, 0.6, budget="kv", kinds="head"),
    *each("ratio", 0.3, budget="kv", kinds="layer"),
    *each("ratio", 0, budget="macs"),
    *each("select", "select-by-group-ratio", "select-by-group-ratio{group_ratio=0.5}", ratio=None),
    *each("select", "select-by-group-ratio{group_ratio=0.999}", ratio=None),
    *each("select", "select-by-ratio{ratio=0.3}", ratio=0.1),
    *each("steps", 1, 2, 7),
    *each("memory", "auto", "low", "fast"),
    *each("recipe", "fast", "balanced", "best", "llm-pruner", f"{RECIPE}, shrink, make-report"),
    options(verify=False, ratio=0.3),
    options(device="cpu"),
]

LARGEST = "the largest reachable ratio is"

REFUSED: dict[str, list[Options]] = {
    LARGEST: [
        *each("ratio", 0.8, 0.9, 0.99, 0.999999, 1 - 1e-16, {"mlp": 0.999, "head": 0.999}, {"expert": 0.5}),
        *each("kinds", "head", "head_dim", "layer", "expert", ratio=0.4),
        *each("protect", (1, 1), (5, 5), (0.5, 0.5), (0.99, 0.0), (0, 2), ratio=0.1),
        *each("round_to", 88, 89, 1000, 10**9, ratio=0.1),
        *each("tensor_parallel", 88, 1000, ratio=0.1),
        options(uniform=True, ratio=0.3, kinds="head"),
        *each("ratio", 0.3, 0.6, budget="kv", kinds="mlp"),
        options(ratio=0.6, budget="kv", kinds="layer"),
        *each("ratio", 0.9, 0.99, budget="macs"),
    ],
    "Pass a number, or numbers by kind": [options(ratio={}), options(round_to={})],
    "Leave kinds or ratio out": [options(ratio={"mlp": 0.3}, kinds="head")],
    "needs widths measured": [options(round_to="auto")],
    "there are no scores for": [
        *each("importance", "l2{kinds=mlp}", "l2{kinds=head}"),
        options(select="select-by-ratio{ratio=0.3, kinds=mlp}", kinds="head"),
    ],
    "Pass token ids as calibration": [
        *each("importance", "wanda", "taylor", "taylor{order=second}", "fisher"),
        options(compensate="least-squares"),
        options(tune="tune"),
    ],
    "unknown format": each("budget", "bytes@q4_x", "bytes@nope"),
    "no such file": each("budget", "decode@nope.json"),
    "unknown budget": each("budget", "", "macs@3"),
    "unknown importance": [options(importance="nope", inplace=True)],
    "the fact Removal is not known": [options(recipe="find-groups, shrink")],
    "is stale since": [options(recipe=f"{RECIPE}, select-by-ratio, shrink, shrink, make-report")],
    "importance comes before select": [options(recipe=f"{RECIPE}, l2, shrink, make-report")],
    "nothing can be computed on meta": [options(device="meta")],
    "cannot be used": [options(device="cuda:99")],
}

WITH_DATA: list[Options] = [
    *each("importance", "wanda", "taylor", "taylor{order=second}", "taylor{order=vector}"),
    *each("compensate", "least-squares", "least-squares{damping=1e9}"),
    *each("kinds", "channel", "layer", compensate="least-squares", ratio=0.3),
    options(importance="taylor", memory="low", kinds=["mlp", "head"]),
    options(importance="taylor", steps=2),
]

REFUSED_WITH_DATA: dict[str, list[Options]] = {
    "is too small for inputs that depend on each other": [
        options(compensate="least-squares{damping=1e-30}", kinds="mlp", ratio=0.4),
        options(importance="reconstruction{ridge=1e-30}", kinds="mlp", ratio=0.4),
    ],
    "there are no scores for": [options(importance="wanda{kinds=mlp}")],
}


def spelled(given: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items() if options().get(name) != value)


def some(rows: list[Options]) -> list[Any]:
    """Rows of which a few run in the first tier."""
    return tiers(rows, *rows[::20])


def refused(table: dict[str, list[Options]]) -> list[tuple[Options, str]]:
    return [(given, says) for says, rows in table.items() for given in rows]


@pytest.mark.parametrize("given", some(TAKEN), ids=spelled)
def test_of_options_that_are_taken(given: Options) -> None:
    assert outcome(given) == ""


@pytest.mark.parametrize("given", tiers(WITH_DATA, WITH_DATA[0]), ids=spelled)
def test_of_options_that_are_taken_with_data(given: Options) -> None:
    assert outcome(given, IDS) == ""


@pytest.mark.slow
def test_of_options_that_are_refused() -> None:
    found = [(spelled(given), says, outcome(given)) for given, says in refused(REFUSED)]
    found += [(spelled(given), says, outcome(given, IDS)) for given, says in refused(REFUSED_WITH_DATA)]
    assert [row for row in found if row[1] not in row[2]] == []
