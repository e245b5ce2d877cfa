"""What a clear refusal is, and the small models that bad calls are made with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.graph.facts import Facts

VOCABULARY = 11
LONGEST = 700
"""Characters of a message: what is longer is not read."""

IDS = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS[:2]}

NOT_NUMBERS: tuple[Any, ...] = (
    None,
    "0.2",
    "",
    True,
    [0.2],
    {},
    0.2j,
    float,
    object(),
    torch.tensor([0.1, 0.2]),
    torch.tensor(True),
)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"), torch.tensor(float("nan")))


class Net(nn.Module):
    """A language model of a few parameters: it traces in a tenth of a second."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.up = nn.Linear(6, width)
        self.down = nn.Linear(width, 6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(samples, tokens, vocabulary)``."""
        x = self.embed(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


def said(value: Any) -> str:
    """A name for a bad value that fits into the name of a test."""
    text = f"{type(value).__name__}-{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return re.sub(r" at 0x\w+|\s+", "", text)[:40]


def each(name: str, values: Iterable[Any], says: str = "", **more: Any) -> Iterator[Any]:
    """Test parameters ``(options, says)``, one for each bad value of an argument."""
    for value in values:
        yield pytest.param({name: value, **more}, says or rf"\b{name}\b", id=f"{name}={said(value)}")


def one(says: str, **options: Any) -> Any:
    """Test parameters ``(options, says)`` of one bad call."""
    return pytest.param(options, says, id=", ".join(f"{name}={said(value)}" for name, value in options.items()))


def check_clear(
    call: Callable[[], Any],
    says: str,
    capfd: pytest.CaptureFixture[str],
    *,
    model: nn.Module | None = None,
    error: type[Exception] = FxpruneError,
) -> FxpruneError:
    """``call`` is refused with an error that says what, where and what to do; nothing is printed, nothing changed."""
    before = None if model is None else fingerprint(model)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned, pytest.raises(error) as caught:
        warnings.simplefilter("always")
        call()
    message, told = str(caught.value), capfd.readouterr()
    refusal = caught.value
    assert isinstance(refusal, FxpruneError)
    assert re.search(says, message, re.DOTALL), message
    assert refusal.what and refusal.where and refusal.remedy, (refusal.what, refusal.where, refusal.remedy)
    assert refusal.remedy in message and len(message) <= LONGEST and "\n" not in message, message
    assert told.out + told.err == "", told
    assert [str(warning.message) for warning in warned] == []
    assert model is None or fingerprint(model) == before
    return refusal


def fingerprint(model: nn.Module) -> list[Any]:
    """All of a model that can be compared."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = [
        (name, id(t), t.dtype, t.device, _shape(t), t.requires_grad, t.grad is None, _values(t)) for name, t in tensors
    ]
    modules = [(name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()]
    return [*values, *modules]


def _shape(tensor: torch.Tensor) -> Any:
    return None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def _values(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        return None
    return repr(tensor.detach().to_dense().reshape(-1).tolist())


def facts_left(graph_module: torch.fx.GraphModule) -> list[str]:
    """Names of the facts about a graph."""
    facts: Facts = fxprune.facts_of(graph_module)
    return sorted(type(fact).__name__ for fact in facts)
