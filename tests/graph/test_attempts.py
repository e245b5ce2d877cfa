"""Refusals of code that is not ours are answers; errors of our own are raised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import FxpruneError, PlanError
from fxprune.graph.context import Refusal, attempt, call_foreign, clear_errors
from fxprune.graph.tensors import get_tensor


class Picky(nn.Module):
    """A module whose constructor refuses odd widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd\nand more about it")
        self.inner = nn.Linear(width, width)


def ours(source: str) -> Any:
    """The function ``run`` of a module that belongs to the package."""
    space: dict[str, Any] = {"__name__": "fxprune.somewhere", "call_foreign": call_foreign}
    exec(source, space)
    return space["run"]


def test_what_is_built_is_returned() -> None:
    built = attempt(Picky, width=4)
    assert isinstance(built, Picky) and built.inner.in_features == 4
    assert attempt(lambda: None) is None


def test_a_constructor_that_refuses_gives_its_reason() -> None:
    refusal = attempt(Picky, 3)
    assert isinstance(refusal, Refusal) and isinstance(refusal.error, ValueError)
    assert str(refusal) == "ValueError: width 3 is odd"
    assert str(Refusal(KeyError())) == "KeyError: "


def test_what_torch_refuses_on_behalf_of_a_stranger_is_a_refusal() -> None:
    module = nn.Linear(3, 2)
    assert isinstance(attempt(module, torch.zeros(1, 4)), Refusal)
    assert isinstance(attempt(module.get_submodule, "nowhere"), Refusal)


def test_arguments_that_a_stranger_does_not_take_are_its_refusal() -> None:
    assert isinstance(attempt(Picky), Refusal)
    through_ours = ours("def run(kind): return call_foreign(kind)")
    assert isinstance(attempt(through_ours, Picky), Refusal)


def test_a_type_error_of_our_own_propagates() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        attempt(ours("def run(): return None + 1"))
    with pytest.raises(AttributeError):
        attempt(get_tensor, nn.Linear(2, 2), 7)


def test_a_stranger_called_by_our_code_may_refuse() -> None:
    assert isinstance(attempt(ours("def run(kind): return kind(3)"), Picky), Refusal)


def test_our_code_called_by_a_stranger_may_not_fail() -> None:
    class Caller(nn.Module):
        """Calls back while it is built."""

        def __init__(self, function: Any) -> None:
            super().__init__()
            function()

    with pytest.raises(ZeroDivisionError):
        attempt(Caller, ours("def run(): return 1 // 0"))


def test_our_own_refusals_are_named() -> None:
    refuse = ours("from fxprune.errors import FxpruneError\ndef run(): raise FxpruneError('no')")
    assert isinstance(attempt(refuse, refusals=(FxpruneError,)), Refusal)
    with pytest.raises(FxpruneError, match="no"):
        attempt(refuse)


def test_interrupts_are_never_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted)


def test_a_copy_that_python_refuses_is_a_refusal() -> None:
    class Stubborn:
        """Cannot be copied."""

        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copy of me")

    assert str(attempt(copy.deepcopy, Stubborn())) == "RuntimeError: no copy of me"


def fail(error: BaseException) -> None:
    """Raise, as code that is not ours."""
    raise error


def test_the_last_net_says_where_and_what_to_do() -> None:
    with (
        pytest.raises(PlanError, match=r"^here: KeyError: 'x'\. Do that$") as caught,
        clear_errors("here", "Do that", PlanError),
    ):
        fail(KeyError("x"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(FxpruneError, match=r"ValueError: y+ \.\.\.") as caught, clear_errors("here", "Do that"):
        fail(ValueError("\n" + "y" * 5000 + "\nz"))
    assert len(str(caught.value)) < 400


def test_the_last_net_tells_a_defect_from_a_refusal() -> None:
    run = ours("def run(): return None + 1")
    with pytest.raises(FxpruneError, match=r"TypeError: .*<string>:1.*Do that. If .* please report it"):
        clear_errors("here", "Do that")(run)()


def test_the_last_net_lets_through_what_is_none_of_its_business() -> None:
    own, memory = FxpruneError("mine"), torch.OutOfMemoryError()
    for error in (own, memory, MemoryError(), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, clear_errors("here", "Do that"):
            fail(error)
        assert caught.value is error
