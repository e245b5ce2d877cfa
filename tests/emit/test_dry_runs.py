"""What stops a slim model without storage, if it does not stop the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune.emit.load as dry_runs
from fxprune.emit.load import DryRuns, run_on_meta
from fxprune.trace.inputs import meta_twin
from tests.models import tiny

Asked = list[tuple[int, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The model and the implementation of each run."""
    found: Asked = []

    def run(model: Any, implementation: str) -> Any:
        found.append((id(model), implementation))
        return run_on_meta(model, implementation=implementation)

    monkeypatch.setattr(dry_runs, "run_on_meta", run)
    return found


def blank() -> Any:
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


def test_the_dense_model_is_not_run_where_the_slim_one_runs(asked: Asked) -> None:
    dense, slim = blank(), blank()
    assert DryRuns(dense).failure_of(slim) is None
    assert asked == [(id(slim), "sdpa"), (id(slim), "eager")]
    asked.clear()
    assert DryRuns(dense).failure_of(slim, patched=False) is None
    assert asked == [(id(slim), "sdpa")]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_what_stops_the_slim_model_alone_is_told(name: str) -> None:
    failure = DryRuns(blank()).failure_of(broken(blank(), name))
    assert failure is not None and failure.startswith(f"under {name} attention: RuntimeError")


def test_what_stops_the_dense_model_too_says_nothing_and_is_asked_once(asked: Asked) -> None:
    dense = broken(blank(), "eager")
    runs = DryRuns(dense)
    assert [runs.failure_of(broken(blank(), "eager")) for _ in range(2)] == [None, None]
    assert asked.count((id(dense), "eager")) == 1 and (id(dense), "sdpa") not in asked


def test_flex_attention_says_nothing_without_storage(asked: Asked) -> None:
    """It is left out since it refuses whatever there is on ``meta``: once it does not, this is to be thought over."""
    dense = blank()
    refusal = run_on_meta(dense, implementation="flex_attention")
    assert refusal is not None and "meta" in str(refusal)
    DryRuns(dense).failure_of(blank())
    assert "flex_attention" not in {name for _, name in asked}


def test_a_model_of_its_own_implementation_is_run_under_it(asked: Asked) -> None:
    dense, slim = blank(), blank()
    for model in (dense, slim):
        model.set_attn_implementation("flex_attention")
    assert DryRuns(dense).failure_of(slim) is None
    assert asked[0] == (id(slim), "flex_attention") and (id(dense), "flex_attention") in asked


def test_a_run_that_fails_is_repeated_without_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that another mode cannot take, as those of higher order, does not stop a model that runs by itself."""
    model, runs = blank(), list[bool]()
    forward = nn.Linear.forward

    def wary(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        runs.append(bool(modes))
        if modes:
            raise NotImplementedError("no rule for this mode")
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", wary)
    assert run_on_meta(model) is None and runs[0] and not runs[-1]
