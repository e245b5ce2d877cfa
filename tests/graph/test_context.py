"""Tests: scopes around code that is not ours: output silenced, torch state restored, errors classified."""

from __future__ import annotations

import copy
import logging
import random
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.errors import FxpruneError, PlanError
from fxprune.graph.context import (
    Refusal,
    as_exported,
    attempt,
    call_foreign,
    clear_errors,
    compiled_later,
    current_tracer,
    neutral,
    node_of,
    own_randomness,
    quiet,
    track,
    unprinted,
    unseen,
    untraced,
)
from fxprune.graph.tensors import get_tensor
from fxprune.trace.repeats.watch import CallLog


def test_warnings_and_logs_are_hidden_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("hidden", stacklevel=1)
            log.error("hidden")
        warnings.warn("heard", stacklevel=1)
        log.error("heard")
    assert [str(warning.message) for warning in told] == ["heard"]
    assert caplog.messages == ["heard"]


def test_errors_are_heard_where_only_warnings_are_to_be_hidden(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with quiet(logging.WARNING):
        log.warning("hidden")
        log.error("heard")
    assert caplog.messages == ["heard"]


def test_inside_another_the_stricter_one_holds_and_an_error_ends_both(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with pytest.raises(KeyError), quiet():
        with quiet(logging.WARNING):
            log.error("hidden")
        raise KeyError
    log.warning("heard")
    assert caplog.messages == ["heard"]


def test_what_is_printed_about_errors_is_hidden_with_them(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet(), unprinted():
        print("hidden", file=sys.stderr)
    with quiet(logging.WARNING):
        print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"


def test_nothing_of_a_users_context_reaches_inside() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with neutral():
            made = torch.ones(2, 2)
            product = made @ weight
            assert made.device.type == "cpu" and not made.is_inference()
            assert product.dtype == torch.float32 and product.requires_grad
        assert torch.ones(2).is_meta and torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


def test_gradients_are_on_where_a_user_has_turned_them_off() -> None:
    before = torch.is_grad_enabled()
    with torch.no_grad(), neutral():
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled() == before


def test_what_is_drawn_inside_draws_nothing_of_the_users() -> None:
    def state() -> list[object]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    plain = state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), own_randomness():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert state() == plain


def test_code_that_was_compiled_runs_as_it_was_written() -> None:
    calls = []

    def backend(graph: object, inputs: object) -> object:
        calls.append(graph)
        return graph

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with neutral():
        assert compiled(torch.ones(1)).item() == 2
    assert calls == []


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


class Doubled(nn.Module):
    """Doubles its input, but tells the export that it does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, as far as a graph knows."""
        tracer: Any = current_tracer()
        if tracer is None:
            return x * 2
        node = node_of(x, tracer)
        assert node is not None and node.op == "placeholder"
        with untraced():
            y = x * 2
        assert node_of(y, tracer) is None
        track(y, node, tracer)
        return y.relu()


def test_a_tensor_stands_for_the_node_that_the_export_is_told() -> None:
    program = torch.export.export(Doubled(), (torch.ones(2, 3),), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.relu.default]
    assert current_tracer() is None


def test_code_finds_that_it_is_exported_and_modes_see_no_calls() -> None:
    with as_exported(), CallLog() as log:
        assert torch.compiler.is_exporting() and torch.compiler.is_compiling()
        with unseen():
            torch.ones(2).relu()
        assert log.calls == []
    assert not torch.compiler.is_exporting() and not torch.compiler.is_compiling()


def test_code_of_a_graph_is_written_once_it_is_run() -> None:
    graph = torch.fx.symbolic_trace(Doubled()).graph
    with compiled_later() as waiting:
        module = torch.fx.GraphModule(nn.Module(), graph)
        assert not hasattr(module, "_code") and set(waiting) == {module}
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    assert "return" in module.code
