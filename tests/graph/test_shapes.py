"""Shapes of values: metadata, size checks, and the cache of ops on ``meta``."""

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from fxprune.graph.compat import fake_mode
from fxprune.graph.facts import facts_of
from fxprune.graph.shapes import MetaOpCache, ShapedCalls, calls_of, failed_check, fits_mode, same_shapes, shape_key


def test_calls_tell_targets_and_literals_apart() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 2, 3).sum(1)

    traced = fxprune.trace(Affine(Net()), {"x": torch.ones(4, 6)})
    graph = traced.graph_module.graph
    before = calls_of(graph)
    assert facts_of(traced.graph_module)[ShapedCalls].calls == before
    size = next(node.meta["val"] for node in graph.nodes if node.op == "placeholder").shape[0]
    assert not isinstance(size, int)
    assert same_shapes(size * 2, size * 2) and not same_shapes(size, size * 2) and not same_shapes(size, 4)
    view = next(node for node in graph.nodes if "reshape" in str(node.target))
    view.args = (view.args[0], [*view.args[1][:-2], 3, 2])
    assert {name for name, call in calls_of(graph).items() if call != before[name]} == {view.name}


def test_values_and_arguments_agree_in_what_decides_the_shape_of_a_result() -> None:
    mode = fake_mode()
    with mode:
        x, turned, short = torch.empty(3, 4), torch.empty(4, 3).T, torch.empty(3, 4, dtype=torch.half)
    assert same_shapes(x, x.clone()) and same_shapes((x, 3), [x, 3])
    for other in (turned, short, x[:2], (x, x), 3, torch.empty(3, 4)):
        assert not same_shapes(x, other)
    assert fits_mode((x, 3), mode) and not fits_mode(x, fake_mode()) and not fits_mode(None, mode)
    assert not fits_mode(torch.empty(3), mode)
    with mode:
        x, other, number = torch.empty(3, 4), torch.empty(3, 4), torch.tensor(3)
    same = ([x, 2], None, "relu"), ([other, 2], None, "relu")
    assert shape_key(same[0]) == shape_key(same[1]) and hash(shape_key(same[0])) == hash(shape_key(same[1]))
    for one, two in (([x, 2], (x, 2)), ([x, 2], [x, 2.0]), (x, x[:2]), (x, x.half()), (1, True)):
        assert shape_key(one) != shape_key(two)
    for unknown in (number, torch.empty(3), {"a": x}):
        with pytest.raises(TypeError):
            shape_key(unknown)


class Affine(nn.Module):
    """A module behind a linear layer, since one without weights is not traced."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.linear(x))


aten = torch.ops.aten


def graph_module() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mode = graph.create_node("placeholder", "mode", ("sum",))
    size = graph.call_function(aten.sym_size.int, (x, 1))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.le, (size, 5)), "at most five"))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.eq, (mode, "sum")), "sums"))
    graph.output(graph.call_function(aten.matmul.default, (x, x)))
    return fx.GraphModule(nn.Module(), graph)


def test_the_first_check_that_fails_is_reported_or_that_cannot_be_computed() -> None:
    def check(**inputs: Any) -> str:
        return failed_check(graph_module(), inputs)

    assert check(x=torch.zeros(2, 5)) == ""  # which the product would refuse: it is not run
    assert check(x=torch.zeros(2, 6)) == check(x=torch.zeros(2, 6), mode="max") == "at most five"
    assert check(x=torch.zeros(2, 5), mode="max") == "sums"
    graph = fx.Graph()
    size = graph.call_function(aten.sym_size.int, (graph.placeholder("x"), 0))
    parts = graph.call_function(operator.mod, (12, graph.call_function(operator.floordiv, (size, 4))))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.eq, (parts, 0)), "parts of twelve"))
    graph.output(size)
    made = fx.GraphModule(nn.Module(), graph)
    failed = [failed_check(made, {"x": torch.zeros(n)}) for n in (8, 20, 3)]
    assert failed == ["", "parts of twelve", "mod divides by zero"]


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ran(body: Any) -> tuple[list[Any], Any]:
    """The ops that are run for `body`, and what it returns."""
    with torch.no_grad(), Counter() as counter, MetaOpCache():
        found = body()
    return counter.ops, found


def test_equal_calls_run_once_and_return_new_tensors() -> None:
    x, y = blank(2, 3), blank(2, 3)
    ops, (one, other) = ran(lambda: (x * 2.0, y * 2.0))
    assert ops.count(aten.mul.Tensor) == 1
    assert one is not other and one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert (other.shape, other.stride(), other.dtype, other.is_meta) == ((2, 3), (3, 1), torch.float32, True)


# what differs: two calls that are both run
OTHERS: dict[str, tuple[Any, Any]] = {
    "shape": (lambda: blank(2, 3) * 2, lambda: blank(3, 2) * 2),
    "stride": (lambda: blank(2, 3) * 2, lambda: blank(3, 2).T * 2),
    "dtype": (lambda: blank(2, 3) * 2, lambda: blank(2, 3, dtype=torch.half) * 2),
    "number": (lambda: blank(2, dtype=torch.int64) * 1, lambda: blank(2, dtype=torch.int64) * 1.0),
    "truth": (lambda: blank(2, dtype=torch.bool) * 1, lambda: blank(2, dtype=torch.bool) * True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_run(name: str) -> None:
    first, second = OTHERS[name]
    wanted = second()
    ops, (_, got) = ran(lambda: (first(), second()))
    assert ops.count(aten.mul.Tensor) == 2
    assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_the_default_dtype_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> list[torch.dtype]:
        found = []
        for dtype in (torch.float32, torch.float64):
            monkeypatch.setattr(torch, "get_default_dtype", lambda dtype=dtype: dtype)
            found.append(blank(2) * 2)
        return found

    assert ran(body)[0].count(aten.mul.Tensor) == 2


def test_views_writes_several_results_and_results_with_storage() -> None:
    x = blank(2, 3)

    def body() -> Any:
        return x.t(), x.t(), x.view(6), x.add_(1), x.add_(1), aten._unsafe_view(x, [6]), aten._unsafe_view(x, [6])

    _, found = ran(body)
    assert {tensor.untyped_storage()._cdata for tensor in found} == {x.untyped_storage()._cdata}
    assert x._version == 2
    ops, (one, other) = ran(lambda: (blank(4, 6).topk(2), blank(4, 6).topk(2)))
    assert ops.count(aten.topk.default) == 1
    assert [(t.shape, t.dtype) for t in one] == [(t.shape, t.dtype) for t in other]
    ops, (mine, yours) = ran(lambda: (torch.ones(2) * 2, torch.ones(2) * 3))
    assert mine.tolist() == [2, 2] and yours.tolist() == [3, 3]


def test_a_failing_call_fails_each_time() -> None:
    linear = nn.Linear(3, 4, device="meta")

    def body() -> int:
        linear(blank(2, 3))
        failed = 0
        for _ in range(2):
            with pytest.raises(RuntimeError):
                linear(blank(2, 5))
            failed += 1
        return failed

    assert ran(body)[1] == 2
