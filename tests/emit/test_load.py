"""Tensors that do not fit, and forward passes under each attention implementation."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import fxprune.emit.snapshot as dry_runs
from fxprune.emit.snapshot import (
    DryRuns,
    attention_implementations,
    configs_of,
    has_unaligned_experts,
    run_on_meta,
    shape_errors,
    use_eager_experts,
    using_attention,
)
from fxprune.modelling.blocks import block_config
from fxprune.trace.inputs import meta_twin
from tests.emit.small import SmallConfig, SmallModel, small
from tests.models import tiny, token_ids


def blank(**fields: int) -> SmallModel:
    with torch.device("meta"):
        return SmallModel(SmallConfig(**fields))


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def test_misfits_are_told() -> None:
    slim, tensors = blank(depth=1), tensors_of(small(depth=1, inner=8))
    assert shape_errors(slim, tensors_of(small(depth=1)), lambda name: name, frozenset()) == []
    told = shape_errors(slim, {**tensors, "more": torch.ones(1)}, lambda name: name, frozenset({"blocks.0.up.bias"}))
    assert told == [
        "blocks.0.down.weight: wanted (12, 8), obtained (12, 20)",
        "blocks.0.up.weight: wanted (8, 12), obtained (20, 12)",
        "more: the class has no such tensor, wanted (1,)",
    ]
    del tensors["norm.bias"]
    assert "norm.bias: no tensor given for it" in shape_errors(slim, tensors, lambda name: name, frozenset())


@pytest.mark.parametrize(("width", "odd"), [(8, False), (6, True)])
def test_experts_of_odd_widths_run_one_by_one(width: int, odd: bool) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8, width))

    model = small(depth=1)
    model.experts = Experts()
    vars(model.config)["_experts_implementation_internal"] = "grouped_mm"
    assert has_unaligned_experts(model) is odd
    use_eager_experts(model)
    assert (vars(model.config)["_experts_implementation_internal"] == "eager") is odd


def test_a_model_runs_under_another_and_is_as_it_was() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    layer = model.model.layers[0]
    layer.self_attn.config = block_config(model.config, {})
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda module, _: seen.append(module.config._attn_implementation))
    with torch.no_grad():
        for name in attention_implementations(model):
            with using_attention(model, name) as taken:
                assert taken
                model(token_ids(), use_cache=False)
    assert seen == ["sdpa", "eager", "flex_attention"]
    assert model.config._attn_implementation == layer.self_attn.config._attn_implementation == "sdpa"
    model = small()
    before = [dict(vars(config)) for config in configs_of(model)]
    with using_attention(model, "flash_attention_2") as taken:
        assert not taken
    assert [dict(vars(config)) for config in configs_of(model)] == before


Asked = list[tuple[int, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The model and the implementation of each run."""
    found: Asked = []

    def run(model: Any, inputs: Any, implementation: str) -> Any:
        found.append((id(model), implementation))
        return run_on_meta(model, inputs, implementation=implementation)

    monkeypatch.setattr(dry_runs, "run_on_meta", run)
    return found


def llama() -> Any:
    return meta_twin(tiny("llama", num_hidden_layers=2))


def broken(model: Any, name: str) -> Any:
    """`model`, whose attention has an output that does not fit; under one implementation of attention alone."""
    own = model.config
    layer: Any = model.model.layers[1].self_attn
    forward = layer.o_proj.forward

    def fails(x: torch.Tensor) -> Any:
        return forward(x[..., :-1] if own._attn_implementation == name else x)

    layer.o_proj.forward = fails
    return model


def test_what_stops_the_slim_model_alone_is_reported(asked: Asked) -> None:
    """What stops the dense model too is ignored, and asked once."""
    for name in ("sdpa", "eager"):
        failure = DryRuns(llama).failure_of(broken(llama(), name))
        assert failure is not None and failure.startswith(f"under {name} attention: RuntimeError")
    asked.clear()
    dense = broken(llama(), "eager")
    runs = DryRuns(lambda: dense)
    assert [runs.failure_of(broken(llama(), "eager")) for _ in range(2)] == [None, None]
    assert asked.count((id(dense), "eager")) == 1 and (id(dense), "sdpa") not in asked


def test_flex_attention_says_nothing_without_storage(asked: Asked) -> None:
    """It is left out since it refuses whatever there is on ``meta``: once it does not, this is to be thought over."""
    dense = llama()
    refusal = run_on_meta(dense, implementation="flex_attention")
    assert refusal is not None and "meta" in str(refusal)
    DryRuns(lambda: dense).failure_of(llama())
    assert "flex_attention" not in {name for _, name in asked}
    asked.clear()
    slim = llama()
    for model in (dense, slim):  # unless it is the model's own
        model.set_attn_implementation("flex_attention")
    assert DryRuns(lambda: dense).failure_of(slim) is None
    assert asked[0] == (id(slim), "flex_attention") and (id(dense), "flex_attention") in asked


def test_a_run_that_fails_is_repeated_without_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that another mode cannot take, as those of higher order, does not stop a model that runs by itself."""
    model, runs = llama(), list[bool]()
    forward = nn.Linear.forward

    def wary(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        runs.append(bool(modes))
        if modes:
            raise NotImplementedError("no rule for this mode")
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", wary)
    assert run_on_meta(model) is None and runs[0] and not runs[-1]
