"""Contexts around foreign code: output silenced, torch state restored, errors classified."""

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
from torch.overrides import TorchFunctionMode

from fxprune.errors import FxpruneError, PlanError
from fxprune.graph.context import (
    Refusal,
    attempt,
    bind_node,
    call_foreign,
    current_tracer,
    default_modes,
    disable_torch_function,
    mark_exporting,
    node_of,
    pause_tracing,
    preserve_rng,
    quiet,
    recompile_lazily,
    silence_stderr,
    wrap_errors,
)
from fxprune.graph.tensors import get_tensor

LOG = logging.getLogger("someone.else")


def test_warnings_logs_and_stderr_are_hidden_up_to_a_level(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("hidden", stacklevel=1)
            LOG.error("hidden")
            print("hidden", file=sys.stderr)
        with quiet(logging.WARNING):
            LOG.warning("hidden")
            LOG.error("seen")
            print("seen", file=sys.stderr)
        with silence_stderr():
            print("hidden", file=sys.stderr)
        warnings.warn("seen", stacklevel=1)
    assert [str(warning.message) for warning in seen] == caplog.messages == ["seen"]
    assert capfd.readouterr().err == "seen\n"


def test_inside_another_the_stricter_one_holds_and_an_error_ends_both(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), quiet():
        with quiet(logging.WARNING):
            LOG.error("hidden")
        raise KeyError
    LOG.warning("seen")
    assert caplog.messages == ["seen"]


def test_a_users_modes_do_not_reach_inside() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with default_modes():
            made = torch.ones(2, 2)
            product = made @ weight
            assert made.device.type == "cpu" and not made.is_inference()
            assert product.dtype == torch.float32 and product.requires_grad
        assert torch.ones(2).is_meta and torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


def test_compiled_code_runs_eagerly_inside() -> None:
    calls = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: calls.append(graph) or graph)
    with default_modes():
        assert compiled(torch.ones(1)).item() == 2
    assert calls == []


def test_random_states_are_preserved() -> None:
    def draw() -> list[object]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    plain = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), preserve_rng():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert draw() == plain


class Picky(nn.Module):
    """A module whose constructor refuses odd widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd\nand more about it")
        self.inner = nn.Linear(width, width)


class Stubborn:
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copy of me")


class Caller(nn.Module):
    """Calls back while it is built."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        function()


def ours(source: str) -> Any:
    """The function ``run`` of a module that belongs to the package."""
    space: dict[str, Any] = {
        "__name__": "fxprune.somewhere",
        "call_foreign": call_foreign,
        "FxpruneError": FxpruneError,
    }
    exec(source, space)
    return space["run"]


def test_results_are_returned() -> None:
    built = attempt(Picky, width=4)
    assert isinstance(built, Picky) and built.inner.in_features == 4
    assert attempt(lambda: None) is None


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (Picky, (3,), "ValueError: width 3 is odd"),
        (nn.Linear(3, 2), (torch.zeros(1, 4),), "RuntimeError: mat1 and mat2"),
        (nn.Linear(3, 2).get_submodule, ("nowhere",), "AttributeError: "),
        (Picky, (), "TypeError: "),
        (ours("def run(kind): return call_foreign(kind)"), (Picky,), "TypeError: "),
        (ours("def run(kind): return kind(3)"), (Picky,), "ValueError: "),
        (copy.deepcopy, (Stubborn(),), "RuntimeError: no copy of me"),
    ],
    ids=["constructor", "torch", "attribute", "arguments", "arguments-through-ours", "through-ours", "copy"],
)
def test_what_foreign_code_raises_is_a_refusal(function: Any, arguments: tuple[Any, ...], text: str) -> None:
    refusal = attempt(function, *arguments)
    assert isinstance(refusal, Refusal) and str(refusal).startswith(text)


def test_the_message_of_a_refusal_may_be_empty() -> None:
    assert str(Refusal(KeyError())) == "KeyError: "


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (ours("def run(): return None + 1"), (), TypeError),
        (get_tensor, (nn.Linear(2, 2), 7), AttributeError),
        (Caller, (ours("def run(): return 1 // 0"),), ZeroDivisionError),
        (ours("def run(): raise KeyboardInterrupt"), (), KeyboardInterrupt),
    ],
    ids=["our-own", "our-function", "called-back", "interrupt"],
)
def test_our_own_defects_and_interrupts_propagate(
    function: Any, arguments: tuple[Any, ...], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        attempt(function, *arguments)


def test_our_own_refusals_are_named() -> None:
    refuse = ours("def run(): raise FxpruneError('no')")
    assert isinstance(attempt(refuse, refusals=(FxpruneError,)), Refusal)
    with pytest.raises(FxpruneError, match="no"):
        attempt(refuse)


def fail(error: BaseException) -> None:
    """Raise, as foreign code."""
    raise error


def test_unforeseen_errors_name_the_place_and_a_remedy() -> None:
    with (
        pytest.raises(PlanError, match=r"^here: KeyError: 'x'\. Do that$") as caught,
        wrap_errors("here", "Do that", PlanError),
    ):
        fail(KeyError("x"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(FxpruneError, match=r"ValueError: y+ \.\.\.") as caught, wrap_errors("here", "Do that"):
        fail(ValueError("\n" + "y" * 5000 + "\nz"))
    assert len(str(caught.value)) < 400
    with pytest.raises(FxpruneError, match=r"TypeError: .*<string>:1.*Do that. If .* please report it"):
        wrap_errors("here", "Do that")(ours("def run(): return None + 1"))()


def test_errors_of_the_package_interrupts_and_memory_pass() -> None:
    for error in (FxpruneError("mine"), torch.OutOfMemoryError(), MemoryError(), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, wrap_errors("here", "Do that"):
            fail(error)
        assert caught.value is error


class Doubled(nn.Module):
    """Doubles its input, but hides it from the export."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, as far as a graph knows."""
        tracer: Any = current_tracer()
        if tracer is None:
            return x * 2
        node = node_of(x, tracer)
        assert node is not None and node.op == "placeholder"
        with pause_tracing():
            y = x * 2
        assert node_of(y, tracer) is None
        bind_node(y, node, tracer)
        return y.relu()


def test_a_tensor_can_be_bound_to_another_node_of_the_export() -> None:
    program = torch.export.export(Doubled(), (torch.ones(2, 3),), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.relu.default]
    assert current_tracer() is None


class Calls(TorchFunctionMode):
    """Refuses every call of a torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def test_code_can_be_marked_as_exporting_and_hidden_from_modes() -> None:
    with mark_exporting(), Calls():
        assert torch.compiler.is_exporting() and torch.compiler.is_compiling()
        with disable_torch_function():
            torch.ones(2).relu()
    assert not torch.compiler.is_exporting() and not torch.compiler.is_compiling()


def test_code_of_a_graph_is_generated_when_it_is_first_run() -> None:
    graph = torch.fx.symbolic_trace(Doubled()).graph
    with recompile_lazily() as pending:
        module = torch.fx.GraphModule(nn.Module(), graph)
        assert not hasattr(module, "_code") and set(pending) == {module}
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    assert "return" in module.code
