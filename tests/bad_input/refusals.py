"""What a clear refusal is, and the small models that bad calls are made with."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import FxpruneError

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
        x = self.embed(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


def net() -> tuple[Net, dict[str, torch.Tensor]]:
    return Net(), INPUTS


def described(value: Any) -> str:
    """A bad value in a line."""
    text = f"{type(value).__name__}-{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return re.sub(r" at 0x\w+|\s+", "", text)[:60]


def each(name: str, values: Iterable[Any], says: str = "", **more: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a table: the keyword arguments of a call, one of them bad, and a pattern of the message."""
    for value in values:
        yield {name: value, **more}, says or rf"\b{name}\b"


def check_table(
    call: Callable[[Any], Any],
    rows: Iterable[tuple[Any, str]],
    capfd: pytest.CaptureFixture[str],
    *,
    model: nn.Module | Callable[[Any], nn.Module | None] | None = None,
    error: type[Exception] = FxpruneError,
) -> None:
    """``call`` clearly refuses the bad value of every row; the error names the rows that it does not refuse."""
    wrong = []
    for value, says in rows:
        watched = model if model is None or isinstance(model, nn.Module) else model(value)
        try:
            check_clear(partial(call, value), says, capfd, model=watched, error=error)
        except (Exception, pytest.fail.Exception) as found:  # a call may raise anything instead
            wrong.append(f"{described(value)}: {type(found).__name__}: {found}")
    assert not wrong, "\n".join(wrong)


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
    message, printed = str(caught.value), capfd.readouterr()
    refusal = caught.value
    assert isinstance(refusal, FxpruneError)
    assert re.search(says, message, re.DOTALL), message
    assert refusal.what and refusal.where and refusal.remedy, (refusal.what, refusal.where, refusal.remedy)
    remedy = refusal.remedy.replace("$", "")  # names of arguments are spelled as each face has them
    assert remedy in message and len(message) <= LONGEST and "\n" not in message, message
    assert printed.out + printed.err == "", printed
    assert [str(warning.message) for warning in warned if warning.category is not DeprecationWarning] == []
    assert model is None or fingerprint(model) == before
    return refusal


def fingerprint(model: nn.Module) -> list[Any]:
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
    return tensor.detach().to_dense().reshape(-1).view(torch.uint8).numpy().tobytes()
