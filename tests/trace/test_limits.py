"""Size limits of a graph: guards, and sizes that the model specialises on."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

import fxprune
from fxprune.data.calibration import make_inputs
from fxprune.errors import GraphInputError
from fxprune.graph.compat import is_check, is_free
from fxprune.graph.counting import count_macs
from fxprune.graph.facts import fork
from fxprune.graph.shapes import failed_check
from fxprune.graph.tensors import input_tensors
from fxprune.trace.capture import trace
from fxprune.trace.fidelity import input_sizes, limit_size, pin_sizes
from tests.oracle import Net
from tests.tiers import tiers
from tests.zoo import tiny_model, token_ids


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
    for graph_module in (found.graph_module, copy.deepcopy(found.graph_module), fork(found.graph_module)):
        with pytest.raises(GraphInputError, match="this graph was traced for inputs with") as caught:
            graph_module(torch.randn(*refuses, 3))
        assert isinstance(caught.value, RuntimeError)
        assert spelled.split()[-1] in str(caught.value) and f"x is {(*refuses, 3)}. Pass" in str(caught.value)
    assert failed_check(found.graph_module, {"x": torch.randn(*refuses, 3)}) in messages(found.graph_module)
    assert failed_check(found.graph_module, {"x": torch.randn(*takes, 3)}) == ""


def messages(graph_module: fx.GraphModule) -> list[str]:
    """Messages of the checks in a graph."""
    return [str(node.args[1]) for node in graph_module.graph.nodes if is_check(node)]


def test_a_module_without_branches_has_no_limits_but_the_sizes_that_are_fixed() -> None:
    found = traced(lambda b, t: True)
    assert found.notes == () and messages(found.graph_module) == []
    fixed = fxprune.trace(found.model, {"x": torch.randn(2, 7, 3)}, dynamic=False).graph_module
    assert len(messages(fixed)) == 2 and failed_check(fixed, {"x": torch.randn(2, 6, 3)})


def test_a_size_can_be_forbidden() -> None:
    graph_module = traced(lambda b, t: True).graph_module
    ((node, name),) = input_tensors(graph_module.graph)
    assert name == "x" and set(input_sizes(graph_module.graph)) == {(node, 0), (node, 1)}
    assert limit_size(graph_module, operator.ne, (node, 1), 1) == "x.shape[1] != 1"
    assert failed_check(graph_module, {"x": torch.randn(2, 1, 3)}) and not failed_check(
        graph_module, {"x": torch.randn(2, 2, 3)}
    )


def test_a_condition_on_a_size_that_is_fixed_later_is_a_limit() -> None:
    """Once dropped: the graph ran at another batch, on the numbers of the traced one."""

    def body(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # the first result has as many rows as the traced batch; the second fixes the number of tokens
        rows = m.table(x)
        return rows.flatten(0, 1).reshape(2, 3, -1).relu(), m.read(rows.flatten(1))

    net = Net(body, table=nn.Embedding(7, 8), read=nn.Linear(24, 2))
    found = fxprune.trace(net, {"x": torch.zeros(2, 3, dtype=torch.long)})
    assert any("x.shape[0]) == 8" in note for note in found.notes), found.notes
    assert not any("not the same" in note for note in found.notes)
    assert failed_check(found.graph_module, {"x": torch.zeros(3, 3, dtype=torch.long)})
    assert not failed_check(found.graph_module, {"x": torch.zeros(2, 3, dtype=torch.long)})


def cut_to_length(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution: the end of the slice became a constant."""
    return m.a(x)[..., : x.shape[-1]]


def half_of_a_picture(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.a(x)[..., : x.shape[-2] // 2, :]


def only_convolutions(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.a(x).relu()


@pytest.mark.parametrize(
    ("body", "layer", "size", "other", "notes"),
    [
        (cut_to_length, nn.Conv1d(3, 4, 3, padding=2), (2, 3, 9), (2, 3, 14), {"holds for x.shape[2] == 9"}),
        (
            half_of_a_picture,
            nn.Conv2d(3, 4, 1),
            (2, 3, 8, 8),
            (2, 3, 12, 8),
            {"holds for x.shape[2] == 8", "holds for x.shape[3] == 8"},
        ),
        (half_of_a_picture, nn.Conv2d(3, 4, 1), (2, 3, 8, 6), (2, 3, 12, 9), {"holds for x.shape[2] == 8"}),
        (only_convolutions, nn.Conv2d(3, 4, 1), (2, 3, 8, 6), (2, 3, 9, 7), set()),
    ],
    ids=["length", "square", "height", "any"],
)
def test_a_size_of_an_image_is_a_limit_where_the_graph_holds_it(
    body: Any, layer: nn.Module, size: tuple[int, ...], other: tuple[int, ...], notes: set[str]
) -> None:
    """Sizes beyond batch and tokens are constants of a trace; at others the graph computed something else, silently."""
    found = trace(Net(body, a=layer).eval(), {"x": torch.randn(*size)})
    assert {note for note in found.notes if note.startswith("holds")} == notes
    x = torch.randn(*other)
    if notes:
        with pytest.raises(GraphInputError, match=r"x\.shape"):
            found.graph_module(x)
    else:
        assert torch.equal(found.graph_module(x), found.model(x))


def free_axes(graph_module: fx.GraphModule) -> list[bool]:
    """Whether the size of each axis of the first input may vary."""
    node = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    return [is_free(size) for size in node.meta["val"].shape]


@pytest.mark.parametrize("model_type", tiers(("mamba2", "cpmant")))
def test_a_number_that_export_takes_for_a_constant_fixes_the_tokens(model_type: str) -> None:
    """Seven tokens are one chunk of 16; counting multiply-accumulates at 64 tokens then failed, and pruning too.

    In the second model, a symbol was once taken for a variable size although tracing had found it to be 7.
    """
    traced = trace(tiny_model(model_type), check=False)
    assert free_axes(traced.graph_module) == [True, False]
    assert traced.notes == ("runs at input_ids of shape (any, 7) alone",)
    assert count_macs(traced.graph_module) > 0
    assert make_inputs(traced.graph_module, None, seed=0)["input_ids"].shape == (2, 7)
    assert traced.graph_module(input_ids=token_ids(3, 7)).logits.shape[:2] == (3, 7)


def test_the_end_of_a_range_is_a_limit() -> None:
    def body(self: Net, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + self.table[: x.shape[1]].reshape(x.shape[1], 5)

    traced = trace(Net(body, lin=nn.Linear(4, 5), table=torch.randn(9, 5)).eval(), {"x": torch.randn(2, 7, 4)})
    assert free_axes(traced.graph_module) == [True, True, False]
    assert traced.notes == ("holds for x.shape[1] <= 9",)
    assert make_inputs(traced.graph_module, None, seed=0)["x"].shape[1] == 7
    assert count_macs(traced.graph_module) > 0


@pytest.mark.parametrize("model_type", tiers(["granitemoeshared", "fuyu"], "fuyu"))
def test_no_cache_is_traced_where_the_config_or_forward_hides_the_word(model_type: str) -> None:
    """`use_cache` among the keywords fixed all sizes; a config without it let the cache into the outputs."""
    model: PreTrainedModel = tiny_model(model_type)
    before = model.config.to_dict()
    traced = trace(model, check=False)
    assert free_axes(traced.graph_module) == [True, True]
    assert traced.notes == () and pin_sizes(traced.graph_module) == ""
    assert model.config.to_dict() == before
