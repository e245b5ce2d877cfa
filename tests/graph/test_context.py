"""Contexts around foreign code: output silenced, torch state restored, errors classified."""

import copy
import os
import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.errors import FxpruneError, PlanError
from fxprune.graph.context import (
    Refusal,
    attempt,
    call_foreign,
    default_modes,
    eval_mode,
    hold_signals,
    preserve_rng,
    recompile_lazily,
    wrap_errors,
)
from fxprune.graph.tensors import get_tensor


def test_a_users_modes_and_compiler_do_not_reach_inside() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with default_modes():
            made = torch.ones(2, 2)
            product = made @ weight
            assert made.device.type == "cpu" and not made.is_inference()
            assert product.dtype == torch.float32 and product.requires_grad
        assert torch.ones(2).is_meta and torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    calls = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: calls.append(graph) or graph)
    with default_modes():
        assert compiled(torch.ones(1)).item() == 2
    assert calls == []


def test_random_states_are_preserved() -> None:
    def draw() -> list[object]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    with preserve_rng():
        plain = draw()
    with pytest.raises(KeyError), preserve_rng():
        raise KeyError(draw())
    assert draw() == plain


def test_each_module_gets_its_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2).eval(), nn.Linear(2, 2))
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True]


class Picky(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd\nand more about it")
        self.inner = nn.Linear(width, width)


class Stubborn:
    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copy of me")


class Caller(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        function()


def ours(source: str) -> Any:
    """The function ``run`` of a module that belongs to the package."""
    space: dict[str, Any] = {"__name__": "fxprune.somewhere", "call_foreign": call_foreign}
    exec(source, space)
    return space["run"]


# name: what foreign code runs, its arguments, and the start of its refusal
REFUSED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "constructor": (Picky, (3,), "ValueError: width 3 is odd"),
    "torch": (nn.Linear(3, 2), (torch.zeros(1, 4),), "RuntimeError: mat1 and mat2"),
    "attribute": (nn.Linear(3, 2).get_submodule, ("nowhere",), "AttributeError: "),
    "arguments": (Picky, (), "TypeError: "),
    "arguments-through-ours": (ours("def run(kind): return call_foreign(kind)"), (Picky,), "TypeError: "),
    "through-ours": (ours("def run(kind): return kind(3)"), (Picky,), "ValueError: "),
    "copy": (copy.deepcopy, (Stubborn(),), "RuntimeError: no copy of me"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_foreign_code_raises_is_a_refusal_and_results_are_returned(name: str) -> None:
    function, arguments, text = REFUSED[name]
    refusal = attempt(function, *arguments)
    assert isinstance(refusal, Refusal) and str(refusal).startswith(text)
    assert str(Refusal(KeyError())) == "KeyError: "
    built = attempt(Picky, width=4)
    assert isinstance(built, Picky) and built.inner.in_features == 4


# name: what raises, its arguments, and the error that propagates
RAISED: dict[str, tuple[Any, tuple[Any, ...], type[BaseException]]] = {
    "our-own": (ours("def run(): return None + 1"), (), TypeError),
    "our-function": (get_tensor, (nn.Linear(2, 2), 7), AttributeError),
    "called-back": (Caller, (ours("def run(): return 1 // 0"),), ZeroDivisionError),
    "interrupt": (ours("def run(): raise KeyboardInterrupt"), (), KeyboardInterrupt),
}


@pytest.mark.parametrize("name", RAISED)
def test_our_own_defects_and_interrupts_propagate(name: str) -> None:
    function, arguments, error = RAISED[name]
    with pytest.raises(error):
        attempt(function, *arguments)
    refuse = ours("def run(): raise KeyError('no')")
    assert isinstance(attempt(refuse, refusals=(KeyError,)), Refusal), "raised to refuse on purpose"


def fail(error: BaseException) -> None:
    raise error


def test_unforeseen_errors_name_the_place_and_a_remedy_and_known_ones_pass() -> None:
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
    for error in (FxpruneError("mine"), torch.OutOfMemoryError(), MemoryError(), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, wrap_errors("here", "Do that"):
            fail(error)
        assert caught.value is error


def test_code_of_a_graph_is_generated_when_it_first_runs() -> None:
    graph = torch.fx.symbolic_trace(nn.ReLU()).graph
    with recompile_lazily():
        module = torch.fx.GraphModule(nn.Module(), graph)
        other = torch.fx.GraphModule(nn.Module(), graph)
    assert not hasattr(module, "_code") and len(torch.fx.symbolic_trace(other).graph.nodes) == 3
    assert torch.equal(module(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 3.0])) and "return" in module.code


def test_signals_wait_for_the_end_of_a_context() -> None:
    """One that arrived in a callback from C++ while a model was traced ended the process."""
    reached: list[Any] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt), hold_signals():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(sum(range(1000)))
        assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    in_thread = threading.Thread(target=lambda: reached.append(hold_signals().__enter__()))  # type: ignore[func-returns-value]
    in_thread.start()
    in_thread.join()
    assert len(reached) == 2, "only the main thread can set handlers"
