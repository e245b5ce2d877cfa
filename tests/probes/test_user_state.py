"""The user's model after tracing and pruning is bit for bit as it was, also where its forward writes to itself."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.trace import inputs
from tests.oracle import Net
from tests.probes.check import equal, state_of

Effect = Callable[[Any, torch.Tensor], torch.Tensor]


def net(effect: Effect, **parts: Any) -> Net:
    """Two products behind an effect, which may write to the module."""
    ends = {"a": nn.Linear(6, 12), "b": nn.Linear(12, 6)}
    return Net(lambda m, x: m.b(F.relu(m.a(effect(m, x)))), **ends, **parts).eval()


def parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def follows_inputs(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A parameter that follows the inputs, as in vector quantisation with moving averages."""
    m.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x - m.mean


def clips(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.a.weight.clamp_(-0.1, 0.1)
    return x


def set_by_first_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Scales set from the first batch, as in ActNorm."""
    if not m.ready:
        m.scale.data = 1 / (x.detach().abs().mean(0) + 1)
        m.ready = True
    return x * m.scale


def power_iteration(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A vector refined in every call, as in spectral normalisation."""
    with torch.no_grad():
        m.u.copy_(F.normalize(m.a.weight @ (m.a.weight.T @ m.u), dim=0))
    return x * (1 + m.u.sum())


def counts(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Counts in a parameter, in a plain tensor, in a list and in a number."""
    m.calls.add_(1)
    m.plain.add_(1)
    m.seen.append(1)
    m.number += 1
    return x


EFFECTS: dict[Effect, dict[str, Any]] = {
    follows_inputs: {"mean": parameter(torch.zeros(6))},
    clips: {},
    lambda m, x: m.table(x): {"table": nn.Embedding(20, 6, max_norm=0.5)},  # renormalises the rows it reads
    set_by_first_batch: {"scale": nn.Parameter(torch.ones(6)), "ready": False},
    power_iteration: {"u": parameter(F.normalize(torch.ones(12), dim=0))},
    counts: {"calls": parameter(torch.zeros(())), "seen": [0], "number": 0},
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("call", ["trace", "prune"])
def test_a_model_that_writes_to_itself_stays_as_it_was(
    effect: Effect, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_FEW", 0)  # else all parameters of models as small as these are copied
    torch.manual_seed(0)
    model = net(effect, **copy.deepcopy(EFFECTS[effect]))
    model.plain = torch.zeros(())  # type: ignore[assignment]
    x = torch.randint(0, 20, (5, 3)) if "table" in EFFECTS[effect] else torch.randn(5, 6)
    before, pointers = state_of(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    try:
        if call == "trace":
            fxprune.trace(model, {"x": x})
        else:
            fxprune.prune(model, [{"x": x}], importance="l2", kinds="mlp", ratio=0.2, example_inputs={"x": x})
    except FxpruneError:
        pass  # a refusal leaves the model alone as well
    assert equal(state_of(model), before)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}


def always_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5, training=True)


def layer_drop(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer left out by Python's random numbers."""
    return x if random.random() < 0.5 else 2 * x


@pytest.mark.parametrize("effect", [always_dropout, layer_drop])
def test_randomness_in_evaluation_is_reported(effect: Effect) -> None:
    """The graph had one draw without a note, or a verification error asked for a report."""
    x = torch.randn(5, 6)
    try:
        result = fxprune.prune(net(effect), importance="l2", kinds="mlp", ratio=0.2, example_inputs={"x": x})
    except FxpruneError as error:
        assert "differ" in str(error) or "random" in str(error)
        return
    assert any("draws random numbers in evaluation" in note for note in result.report.notes)
    assert result.report.verification_error is None


def test_a_module_without_randomness_has_no_such_note() -> None:
    assert not any("random" in note for note in fxprune.trace(net(lambda m, x: x), {"x": torch.randn(5, 6)}).notes)
