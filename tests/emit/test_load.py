"""Tensors put into models, and models run without storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fxprune.emit.load import (
    assign,
    has_odd_experts,
    left_on_meta,
    misfits,
    missing_modules,
    run_on_meta,
    standins,
    suit_experts,
)
from tests.emit.small import SmallConfig, SmallModel, small


def blank(**fields: int) -> SmallModel:
    """A model without storage."""
    with torch.device("meta"):
        return SmallModel(SmallConfig(**fields))


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its parameters."""
    return dict(model.named_parameters(remove_duplicate=False))


def test_tensors_are_assigned_not_copied() -> None:
    dense, slim = small(depth=1), blank(depth=1)
    dense.norm.weight.requires_grad_(False)
    given = {**tensors_of(dense), "norm.bias": torch.ones(12)}
    assign(slim, dense, given, lambda name: name)
    assert slim.embed.weight is dense.embed.weight and not slim.norm.weight.requires_grad
    assert isinstance(slim.norm.bias, nn.Parameter) and slim.norm.bias.data_ptr() == given["norm.bias"].data_ptr()
    assert left_on_meta(slim) == [] and not slim.training


def test_names_that_are_gone_are_left_out() -> None:
    dense, slim = small(depth=2), blank(depth=1)
    assign(slim, dense, tensors_of(dense), lambda name: None if name.startswith("blocks.1") else name)
    assert slim.blocks[0].up.weight is dense.blocks[0].up.weight


def test_misfits_are_told() -> None:
    slim, tensors = blank(depth=1), tensors_of(small(depth=1, inner=8))
    assert misfits(slim, tensors_of(small(depth=1)), lambda name: name, frozenset()) == []
    told = misfits(slim, {**tensors, "more": torch.ones(1)}, lambda name: name, frozenset({"blocks.0.up.bias"}))
    assert told == [
        "blocks.0.down.weight: wanted (12, 8), obtained (12, 20)",
        "blocks.0.up.weight: wanted (8, 12), obtained (20, 12)",
        "more: the class has no such tensor, wanted (1,)",
    ]
    del tensors["norm.bias"]
    assert "norm.bias: no tensor given for it" in misfits(slim, tensors, lambda name: name, frozenset())


def test_modules_of_the_user_are_missed() -> None:
    dense = small(depth=1)
    assert missing_modules(blank(depth=1), dense, lambda name: name) == []
    dense.probe = nn.Identity()
    assert missing_modules(blank(depth=1), dense, lambda name: name) == ["probe: the class builds no such module"]


def test_a_model_runs_without_storage_or_says_what_stops_it() -> None:
    assert run_on_meta(blank()) is None
    broken = blank()
    broken.norm = nn.LayerNorm(5, device="meta")
    assert str(run_on_meta(broken)).startswith("RuntimeError: ")


def test_standins_are_shared_as_their_tensors_are() -> None:
    weight, other = torch.ones(2), torch.zeros(3, dtype=torch.half)
    made = standins({"a": weight, "b": weight, "c": other})
    assert made["a"] is made["b"] and made["c"].dtype == torch.half and made["c"].is_meta
    model = nn.Module()
    vars(model)["table"] = made["a"]
    assert left_on_meta(model) == [".table"]


@pytest.mark.parametrize(("width", "odd"), [(8, False), (6, True)])
def test_experts_of_odd_widths_run_one_by_one(width: int, odd: bool) -> None:
    class Experts(nn.Module):
        """Matrices side by side."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8, width))

    model = small(depth=1)
    model.experts = Experts()
    vars(model.config)["_experts_implementation_internal"] = "grouped_mm"
    assert has_odd_experts(model) is odd
    suit_experts(model)
    assert (vars(model.config)["_experts_implementation_internal"] == "eager") is odd
