"""Sizes that branches depend on are checks of the graph, in words that name the input and the line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph.shapes import limits_of, refusal
from fxprune.graph.tensors import input_tensors
from fxprune.trace.limits import forbid, sizes_of
from tests.oracle import Net


def traced(condition: Callable[[int, int], bool], size: tuple[int, int] = (2, 7)) -> fxprune.Traced:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.a(x) * 2 if condition(*x.shape[:2]) else m.a(x)

    return fxprune.trace(Net(body, a=nn.Linear(3, 4)), {"x": torch.randn(*size, 3)})


@pytest.mark.parametrize(
    ("condition", "spelled", "takes", "refuses"),
    [
        (lambda b, t: t > 9, "x.shape[1] <= 9", (2, 9), (2, 10)),
        (lambda b, t: t == 13, "x.shape[1] != 13", (2, 12), (2, 13)),
        (lambda b, t: b == t, "x.shape[0] != x.shape[1]", (3, 7), (7, 7)),
        (lambda b, t: t % 2 == 1, "% 2", (2, 5), (2, 6)),
        (lambda b, t: int(t**0.5) == 3, "x.shape[1]", (2, 7), (2, 9)),
    ],
    ids=["range", "hole", "equality", "remainder", "root"],
)
def test_a_branch_is_a_limit(condition: Any, spelled: str, takes: tuple[int, int], refuses: tuple[int, int]) -> None:
    found = traced(condition)
    (note,) = found.notes
    assert note.startswith("holds for") and spelled in note and "test_limits.py" in note, note
    assert found.graph_module(torch.randn(*takes, 3)).shape == (*takes, 4)
    with pytest.raises(RuntimeError, match="this graph was traced for inputs with"):
        found.graph_module(torch.randn(*refuses, 3))
    assert refusal(found.graph_module, {"x": torch.randn(*refuses, 3)}) in limits_of(found.graph_module)
    assert refusal(found.graph_module, {"x": torch.randn(*takes, 3)}) == ""


def test_a_module_without_branches_has_no_limits_but_the_sizes_that_are_fixed() -> None:
    found = traced(lambda b, t: True)
    assert found.notes == () and limits_of(found.graph_module) == ()
    fixed = fxprune.trace(found.model, {"x": torch.randn(2, 7, 3)}, dynamic=False).graph_module
    assert len(limits_of(fixed)) == 2 and refusal(fixed, {"x": torch.randn(2, 6, 3)})


def test_a_size_can_be_forbidden() -> None:
    graph_module = traced(lambda b, t: True).graph_module
    ((node, name),) = input_tensors(graph_module.graph)
    assert name == "x" and set(sizes_of(graph_module.graph)) == {(node, 0), (node, 1)}
    assert forbid(graph_module, (node, 1), 1) == "x.shape[1] != 1"
    assert refusal(graph_module, {"x": torch.randn(2, 1, 3)}) and not refusal(graph_module, {"x": torch.randn(2, 2, 3)})


class FixedLater(nn.Module):
    """Asks about the product of two sizes, one of which turns out to be a number afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.read = nn.Linear(24, 2)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first result has as many rows as the batch was traced with; the second fixes the number of tokens."""
        rows = self.table(ids)
        return rows.flatten(0, 1).reshape(2, 3, -1).relu(), self.read(rows.flatten(1))


def test_what_was_asked_of_a_size_that_is_fixed_later_is_a_limit() -> None:
    """It was dropped: the graph ran at another batch, on the numbers of the traced one."""
    found = fxprune.trace(FixedLater(), {"ids": torch.zeros(2, 3, dtype=torch.long)})
    assert any("ids.shape[0]) == 8" in note for note in found.notes), found.notes
    assert not any("not the same" in note for note in found.notes)
    assert refusal(found.graph_module, {"ids": torch.zeros(3, 3, dtype=torch.long)})
    assert not refusal(found.graph_module, {"ids": torch.zeros(2, 3, dtype=torch.long)})
