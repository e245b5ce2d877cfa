"""Every kind of unit of each family: removing it equals masking it and zeroing it by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fxprune
from fxprune.axes import Keep
from fxprune.removal.plan import Plan, plan_of
from tests.models import FAMILIES, tiny, token_ids
from tests.oracle import axes_of, groups_of, zeroed
from tests.random_networks import check_every_removal
from tests.remembered import grouped, model_of, pruned
from tests.tiers import tiers

KINDS_OF_ALL = {"mlp", "head", "head_dim", "channel", "layer"}


@pytest.mark.parametrize("family", tiers(FAMILIES, "llama", "gpt2"))
def test_groups_remove_exactly(family: str) -> None:
    depth = "n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers"
    model = tiny(family, use_cache=False, **{depth: 2})
    dense = check_every_removal(model, {"input_ids": token_ids()}, dynamic=True, thorough=False)
    assert {group.kind for group in groups_of(dense)} == KINDS_OF_ALL
    assert {"mlp", "head_dim"} <= {group.kind for group in groups_of(dense) if not group.renormalised}


@pytest.mark.slow
def test_slopes_built_from_positions_stay_with_their_heads() -> None:
    """A model with fewer heads would make other slopes; those that stay are those of the heads that stay."""
    dense, ids = grouped("bloom"), token_ids()
    model = model_of(dense)
    (heads,) = [group for group in groups_of(dense) if group.kind == "head"]
    assert {member.name for member in heads.members if not member.trained} == {"constant_0"}
    assert heads.factor is not None
    plan = plan_of(axes_of(dense), Keep({heads.factor: np.array([False, True, True, False])}))
    assert "constant_0" not in plan.kept  # a name in this graph alone
    result = fxprune.apply(model, Plan.from_json(plan.to_json()))
    before = dense.get_buffer("constant_0").flatten()
    assert torch.equal(result.graph_module.get_buffer("constant_0").flatten(), before[1:3])
    with torch.no_grad():
        assert torch.allclose(result(input_ids=ids).logits, zeroed(model, plan)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", tiers(FAMILIES, "llama"))
@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_width_and_depth(family: str, kind: str) -> None:
    result = pruned(
        family, importance="l2", select="select-by-group-ratio{group_ratio=0.34}", kinds=(kind,), protect=()
    )
    dense, slim = result.report.parameters
    assert slim < dense
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    assert result(input_ids=token_ids(3, 5)).logits.shape == (3, 5, 131)
    assert result.model is not None, result.report.model_reasons
