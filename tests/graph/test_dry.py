"""Ops that are called alike are worked out once; what a run does to shapes, and where it fails, is as without that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.graph.shapes import WorkedOutOnce

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Writes down the ops that are really run."""

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
    with torch.no_grad(), Counter() as counter, WorkedOutOnce():
        found = body()
    return counter.ops, found


def test_what_is_called_alike_is_run_once_and_makes_new_tensors() -> None:
    x, y = blank(2, 3), blank(2, 3)
    ops, (one, other) = ran(lambda: (x * 2.0, y * 2.0))
    assert ops.count(aten.mul.Tensor) == 1
    assert one is not other and one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert (other.shape, other.stride(), other.dtype, other.is_meta) == ((2, 3), (3, 1), torch.float32, True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: blank(2, 3) * 2, lambda: blank(3, 2) * 2),
        (lambda: blank(2, 3) * 2, lambda: blank(3, 2).T * 2),
        (lambda: blank(2, 3) * 2, lambda: blank(2, 3, dtype=torch.half) * 2),
        (lambda: blank(2, dtype=torch.int64) * 1, lambda: blank(2, dtype=torch.int64) * 1.0),
        (lambda: blank(2, dtype=torch.bool) * 1, lambda: blank(2, dtype=torch.bool) * True),
    ],
    ids=["shape", "stride", "dtype", "kind of number", "truth"],
)
def test_what_is_called_otherwise_is_run(first: Any, second: Any) -> None:
    wanted = second()
    ops, (_, got) = ran(lambda: (first(), second()))
    assert ops.count(aten.mul.Tensor) == 2
    assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_the_default_dtype_counts() -> None:
    def body() -> list[torch.dtype]:
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            found.append((blank(2, dtype=torch.int64) / 2).dtype)
        return found

    try:
        assert ran(body)[1] == [torch.float32, torch.float64]
    finally:
        torch.set_default_dtype(torch.float32)


def test_views_are_views_and_what_is_written_to_is_written_to() -> None:
    x = blank(2, 3)

    def body() -> Any:
        return x.t(), x.t(), x.view(6), x.add_(1), x.add_(1), aten._unsafe_view(x, [6]), aten._unsafe_view(x, [6])

    _, found = ran(body)
    assert {tensor.untyped_storage()._cdata for tensor in found} == {x.untyped_storage()._cdata}
    assert x._version == 2


def test_several_results_and_results_with_storage() -> None:
    ops, (one, other) = ran(lambda: (blank(4, 6).topk(2), blank(4, 6).topk(2)))
    assert ops.count(aten.topk.default) == 1
    assert [(t.shape, t.dtype) for t in one] == [(t.shape, t.dtype) for t in other]
    ops, (mine, yours) = ran(lambda: (torch.ones(2) * 2, torch.ones(2) * 3))
    assert mine.tolist() == [2, 2] and yours.tolist() == [3, 3]


def test_what_does_not_fit_fails_each_time() -> None:
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
