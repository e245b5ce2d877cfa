"""The user's model after tracing and pruning is bit for bit as it was, also where its forward writes to itself."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.trace import inputs
from tests.probes.check import equal, state_of


class Net(nn.Module):
    """Two products; subclasses add a side effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(self.effect(x))))  # type: ignore[no-any-return]


class Codebook(Net):
    """A parameter that follows the inputs, as in vector quantisation with moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(6), requires_grad=False)

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


class Clipped(Net):
    """Weights clipped in forward."""

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.a.weight.clamp_(-0.1, 0.1)
        return x


class MaxNorm(nn.Module):
    """An embedding that renormalises the rows it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(20, 6, max_norm=0.5), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(self.e(x))))  # type: ignore[no-any-return]


class FirstBatch(Net):
    """Scales set from the first batch, as in ActNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(6)), False

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.scale.data = 1 / (x.detach().abs().mean(0) + 1)
            self.ready = True
        return x * self.scale


class PowerIteration(Net):
    """A vector refined in every call, as in spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(F.normalize(torch.ones(12), dim=0), requires_grad=False)

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.u.copy_(F.normalize(self.a.weight @ (self.a.weight.T @ self.u), dim=0))
        return x * (1 + self.u.sum())


class Counter(Net):
    """A counter in a parameter, in a plain tensor, in a list and in a number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.plain, self.seen, self.number = torch.zeros(()), [0], 0

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.plain.add_(1)
        self.seen.append(1)
        self.number += 1
        return x


@pytest.mark.parametrize("kind", [Codebook, Clipped, MaxNorm, FirstBatch, PowerIteration, Counter])
@pytest.mark.parametrize("call", ["trace", "prune"])
def test_a_model_that_writes_to_itself_stays_as_it_was(
    kind: type[nn.Module], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_FEW", 0)  # else all parameters of models as small as these are copied
    torch.manual_seed(0)
    model = kind().eval()
    x = torch.randint(0, 20, (5, 3)) if kind is MaxNorm else torch.randn(5, 6)
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


class AlwaysDropout(Net):
    """Dropout that is on in evaluation too."""

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True)


class LayerDrop(Net):
    """A layer left out by Python's random numbers."""

    def effect(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.5 else 2 * x


@pytest.mark.parametrize("kind", [AlwaysDropout, LayerDrop])
def test_randomness_in_evaluation_is_reported(kind: type[nn.Module]) -> None:
    """The graph had one draw without a note, or a verification error asked for a report."""
    x = torch.randn(5, 6)
    try:
        result = fxprune.prune(kind().eval(), importance="l2", kinds="mlp", ratio=0.2, example_inputs={"x": x})
    except FxpruneError as error:
        assert "differ" in str(error) or "random" in str(error)
        return
    assert any("draws random numbers in evaluation" in note for note in result.report.notes)
    assert result.report.verification_error is None


def test_a_module_without_randomness_has_no_such_note() -> None:
    assert not any("random" in note for note in fxprune.trace(Net().eval(), {"x": torch.randn(5, 6)}).notes)
