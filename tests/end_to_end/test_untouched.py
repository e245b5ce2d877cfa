"""Pruning reads the model and inputs and writes to neither, and leaves nothing behind."""

import collections
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from tests.models import tiny
from tests.tiers import tiers


class Writing(nn.Module):
    """A language model whose forward counts its calls, keeps a running mean, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(31, 8), nn.Linear(8, 12), nn.Linear(12, 31)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.ones(12))

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        shift.mul_(2)
        hidden = self.up(self.embed(ids) + shift).relu()
        self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean((0, 1)))
        return self.down(hidden - self.mean)  # type: ignore[no-any-return]


def test_buffers_and_inputs_that_forward_writes_to_stay_as_they_are() -> None:
    """Buffers counted on while the removal was verified, and example inputs came back changed."""
    model = Writing().eval()
    with torch.no_grad():
        model.mean.uniform_()
    inputs = {"ids": torch.randint(31, (2, 9)), "shift": torch.randn(2, 9, 8)}
    rows = [{"ids": torch.randint(31, (9,)), "shift": torch.randn(1, 9, 8)[0]} for _ in range(3)]
    given = [{name: value.clone() for name, value in row.items()} for row in (inputs, *rows)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxprune.prune(
        model,
        rows,
        recipe="llm-pruner",
        select="select-by-group-ratio{group_ratio=0.5}",
        protect=(),
        example_inputs=inputs,
        importance="taylor{order=mix}",
        compensate="least-squares",
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for now, then in zip((inputs, *rows), given, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    slim = result.graph_module
    assert float(slim.calls) == 0 and slim.mean.shape == (6,)
    slim(ids=inputs["ids"], shift=inputs["shift"].clone())
    assert float(slim.calls) == 1 and float(model.calls) == 0


@pytest.mark.parametrize("at", tiers(["verify", "emit", "interrupt"], "verify"))
def test_a_removal_that_fails_in_place_leaves_the_model_whole(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model was cut already when the check of the slim graph failed."""
    from fxprune.passes import emit as emit_model
    from fxprune.passes.shrink import shrink as verify_removal

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt if at == "interrupt" else RuntimeError("no")

    kinds = ("mlp", "head", "channel")
    model = tiny("llama", tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    if at == "verify":
        monkeypatch.setattr(verify_removal, "compare", lambda *_: 1.0)
    elif at == "emit":
        monkeypatch.setattr(emit_model, "emit_from_graph", stop)
    else:
        monkeypatch.setattr(verify_removal, "slim_outputs", stop)
    error = {"verify": fxprune.FxpruneError, "emit": fxprune.FxpruneError, "interrupt": KeyboardInterrupt}[at]
    with pytest.raises(error):
        fxprune.prune(model, importance="l2", ratio=0.2, kinds=kinds, protect=(), inplace=True, verify=at != "emit")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert model.lm_head.weight is model.model.embed_tokens.weight
    monkeypatch.undo()
    assert fxprune.prune(model, importance="l2", protect=(), inplace=True).model is model


WATCHED = ("GraphModule", "Graph", "ShapeEnv", "FakeTensorMode", "_DispatchCacheKey", "SymNode", "Facts", "Result")


def prune_once() -> list[weakref.ref[Any]]:
    model = tiny("llama", num_hidden_layers=1, hidden_size=24)
    result = fxprune.prune(model, None, importance="l1", ratio=0.1, protect=())
    return [weakref.ref(found) for found in (model, result.graph_module, result.model, model.config)]


def census() -> dict[str, int]:
    """How many objects there are of each class that grew."""
    gc.collect()
    counted = collections.Counter(type(found).__name__ for found in gc.get_objects())
    return {name: counted[name] for name in WATCHED}


@pytest.mark.slow
def test_prunes_leave_nothing_behind() -> None:
    """Every prune left two megabytes: torch remembers results by symbols, and these hold the trace that they are of."""
    refs = prune_once()
    before = census()
    refs += [*prune_once(), *prune_once()]
    after = census()
    assert not [ref for ref in refs if ref() is not None]
    assert all(after[name] <= before[name] + 2 for name in WATCHED), (before, after)
