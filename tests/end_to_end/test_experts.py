"""Stacked experts, each of which loses channels of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fxprune.passes.importance import ImportancePass
from transformers import PreTrainedModel

import fxprune
from fxprune.errors import PlanError
from fxprune.graph.facts import Source, facts_of, restore_cut
from fxprune.graph.tensors import named_tensors
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.plan import keep_of
from fxprune.removal.removal import Scores
from tests.models import tiny, token_ids
from tests.oracle import axes_of, copy_of, discover, groups_of, leaving, require_close, together
from tests.tiers import tiers

IDS = token_ids()


def renumbered(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose experts have their channels in other orders, each in another: it computes the same."""
    twin: Any = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    for layer in twin.model.layers:
        for up, down in zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True):
            order = torch.randperm(down.shape[1], generator=generator)
            with torch.no_grad():
                up.copy_(up.view(2, -1, up.shape[1])[:, order].flatten(0, 1))
                down.copy_(down[:, order])
    return twin  # type: ignore[no-any-return]


CRITERIA = {
    "l2": "l2",
    "wanda": "wanda",
    "flap": "flap",
    "taylor-vector": "taylor{order=vector}",
    "taylor-mix": "taylor{memory=low}",
    "product": "multiply-scores{criteria=[wanda{readers_only}, taylor{order=second}]}",
    "in-steps": "score-in-steps{importance=l2, select=select-by-ratio{ratio=0.3, kinds=mlp}, steps=2}",
}


@pytest.mark.parametrize("name", tiers(list(CRITERIA), "product"))
def test_the_order_of_channels_within_an_expert_does_not_matter(name: str) -> None:
    """All experts lost the channels of one list, whatever these were in each."""
    model = tiny("mixtral")
    options: dict[str, Any] = {"importance": CRITERIA[name], "kinds": "mlp", "ratio": 0.3, "protect": ()}
    options |= {"recipe": "llm-pruner", "compensate": "least-squares{damping=0.1}"}
    found, again = (fxprune.prune(each, IDS, **options) for each in (model, renumbered(model)))
    assert found.model is not None and again.model is not None
    rows = found.plan.kept["model.layers.0.mlp.experts.down_proj"][2]
    assert len(rows) == 5 and rows != again.plan.kept["model.layers.0.mlp.experts.down_proj"][2]
    require_close([found.model(IDS).logits], [again.model(IDS).logits], "another order", 1e-4)


def test_experts_and_channels_of_those_that_stay_go_together(tmp_path: Path) -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    dense = discover(model)
    groups = [group for group in groups_of(dense) if group.kind in ("mlp", "expert")]
    keep = together([leaving(group, group.size - 2, seed) for seed, group in enumerate(groups)])
    plan = fxprune.Removal(axes_of(dense), groups_of(dense), keep).plan
    up, down = (plan.kept[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert [len(up[0]), len(up[1]), len(down[2])] == [3, 3, 3] and up[0] == down[0]
    assert fxprune.Plan.from_json(plan.to_json()) == plan
    read = keep_of(axes_of(dense), groups_of(dense), plan)
    assert fxprune.Removal(axes_of(dense), groups_of(dense), read).plan == plan
    assert "experts.down_proj[2]: 86 kept" in str(plan).replace(" of 88", "")
    result = fxprune.apply(model, plan, compensate="none", tune="none")
    assert result.report.verification_error is not None
    result.save_pretrained(tmp_path / "slim")
    assert torch.equal(fxprune.from_pretrained(tmp_path / "slim")(IDS).logits, result.model(IDS).logits)
    wrong: list[Any] = [down[2][:2], [row[:-1] + row[:1] for row in down[2]], [[99, *row[1:]] for row in down[2]]]
    for rows in wrong:
        kept = {**plan.kept, "model.layers.0.mlp.experts.down_proj": {**down, 2: rows}}
        with pytest.raises(PlanError, match="do not fit an axis"):
            keep_of(axes_of(dense), groups_of(dense), fxprune.Plan(kept, sizes=plan.sizes))


def test_what_was_cut_off_in_place_is_put_back() -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    dense = fxprune.trace(model).graph_module
    select = "select-by-ratio{ratio=0.4, kinds=[mlp, expert], protect=[]}"
    Pipeline(f"find-groups, random{{kinds=[mlp, expert]}}, {select}, bypass-blocks, slice-parameters")(
        dense, inplace=True
    )
    assert model.model.layers[0].mlp.experts.down_proj.shape != before["model.layers.0.mlp.experts.down_proj"].shape
    restore_cut(facts_of(dense)[Source])
    after = dict(named_tensors(model))
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@dataclass(frozen=True, eq=False)
class ByChannel(ImportancePass):
    """Scores channels by their number, one for all experts."""

    name: ClassVar[str] = "by-channel"

    def score(self, graph_module: Any, groups: Any) -> Scores:
        return Scores({group.name: np.arange(group.size, dtype=float) for group in groups})


@pytest.mark.parametrize(
    "importance", [ByChannel(kinds="mlp"), "fisher{kinds=mlp}", "reconstruction{kinds=mlp}"], ids=str
)
def test_a_criterion_that_tells_no_experts_apart_takes_the_same_channels_of_all(importance: Any) -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    result = fxprune.prune(model, IDS, recipe="llm-pruner", importance=importance, kinds="mlp", protect=(), ratio=0.3)
    rows = result.plan.kept["model.layers.0.mlp.experts.down_proj"][2]
    assert all(isinstance(row, int) for row in rows)
    if isinstance(importance, ByChannel):
        assert rows == list(range(88 - len(rows), 88))
        scores = Scores({"model.layers.0/mlp": np.arange(88.0)})
        again = fxprune.load_pass("load-scores", scores=scores)
        options = {"recipe": "llm-pruner", "kinds": "mlp", "protect": (), "ratio": 0.3}
        assert fxprune.prune(model, importance=again, **options).plan == result.plan
