"""Ops of users, each with a rule of one decorator, from the module to the slim graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import CustomOpDef

import fxprune
from fxprune.rules import registry
from tests.oracle import Net, axes_of, check_removes_exactly, discover
from tests.rules.test_routing import EXPERTS, Mixture, run_experts
from tests.rules.test_rules import Middle, between


def foreign(function: Callable[..., torch.Tensor]) -> CustomOpDef:
    """A function as an op of its own, which computes shapes as it computes values."""
    made = torch.library.custom_op(f"foreign::{function.__name__}", function, mutates_args=())
    made.register_fake(function)
    return made


@foreign
def turned(x: torch.Tensor) -> torch.Tensor:
    """The last two axes change places, and nothing else does."""
    return x.mT.clone()


@foreign
def same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether two numbers are the same."""
    return x == y


@foreign
def project(x: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer whose matrix is (in, out)."""
    return x @ matrix if shift is None else x @ matrix + shift


@foreign
def blank(x: torch.Tensor) -> torch.Tensor:
    """Ones of the shape of `x`."""
    return torch.ones(x.shape)


@foreign
def halves(x: torch.Tensor, count: int) -> torch.Tensor:
    """The values of each of `count` parts of the last axis in the other order."""
    return x.unflatten(-1, (count, x.shape[-1] // count)).flip(-1).flatten(-2)


halves.register_fake(lambda x, count: torch.empty_like(x))  # so that a wrong number shows when it runs


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    """Rules of the ops, removed after each test."""
    before = dict(registry._RULES)
    fxprune.rule("foreign::turned", notation="x[*b, i, j] -> out[*b, j, i]", values="moved")
    fxprune.rule(
        "foreign::project", notation="x[*b, i], matrix[i, o], shift[o]? -> out[*b, o]  sums i", values="product"
    )
    fxprune.rule("foreign::blank", notation="x[*a] -> out[*a]", values="shape")

    @fxprune.rule("foreign::same", values="compared")
    def rule_for_same(op: fxprune.OpSite) -> None:
        for x in op.tensors:
            op.broadcast(x)

    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def test_an_op_without_a_rule_is_frozen() -> None:
    del registry._RULES["foreign::turned"]
    dense = check_removes_exactly(*between(lambda h: turned(turned(h))), [])
    assert set(axes_of(dense).unruled.values()) == {"foreign.turned.default"}


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: turned(turned(h.relu())),
        lambda h: h + turned(turned(h)).sum(-1, keepdim=True),  # zeros stay zeros where values are moved
        lambda h: h * blank(h) + blank(h),
    ],
    ids=["moved", "moved zeros", "shape"],
)
def test_ops_that_move_values_or_read_shapes(middle: Middle) -> None:
    check_removes_exactly(*between(middle), [12])


def test_one_that_multiplies_and_sums() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return project(project(x, m.first, m.shift).relu(), m.last)

    parts = {
        name: nn.Parameter(torch.randn(*s)) for name, s in (("first", (10, 12)), ("shift", (12,)), ("last", (12, 9)))
    }
    dense = check_removes_exactly(Net(body, **parts), {"x": torch.randn(2, 7, 10)}, [12])
    assert axes_of(dense).rules["project"] == "project  x[b, s, i], matrix[i, o], shift[o] -> out[b, s, o]  sums i"


def test_a_product_of_zeros_is_zero() -> None:
    """A sum over units that only the product made zero finds zeros."""
    net, inputs = between(lambda h: h)
    net.m = nn.Parameter(torch.randn(12, 12))
    net.body = lambda m, x: m.b(project(m.a(x), m.m).pow(2).cumsum(-1))
    check_removes_exactly(net, inputs, [12, 12])


def compared(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Tokens that agree on their best expert are doubled: positions are compared only."""
    gates, chosen = m.router(x).softmax(-1).topk(2, -1)
    agree = same(chosen[:, :1], chosen.flip(0)[:, :1])
    return run_experts(m, x, chosen, gates * (1 + agree))


def test_one_that_compares_positions() -> None:
    dense = discover(Mixture(compared), {"x": torch.randn(11, 5)})
    axes = axes_of(dense)
    (experts,) = (f for e in axes.tensors["router.weight"][:1] for f in fxprune.axes.factors(e))
    assert experts.size == EXPERTS and experts not in axes.frozen
    assert axes.unruled == {}
    check_removes_exactly(Mixture(compared), {"x": torch.randn(11, 5)})


def pruned_halves(**options: Any) -> fxprune.Result:
    """A prune of a model whose units pass `halves`."""
    net, inputs = between(lambda h: halves(h, 3))
    options |= {"recipe": "llm-pruner", "protect": (), "ratio": 0.2, "example_inputs": inputs}
    return fxprune.prune(net, importance="l1", **options)


def test_the_nearest_word_for_values_is_suggested_as_it_is_written() -> None:
    """It was ``<Values.MOVED: 'moved'>``."""
    with pytest.raises(fxprune.FxpruneError, match=r"unknown values 'move'. Did you mean 'moved'\? Known: cast, "):
        fxprune.rule("foreign::blank", notation="x[*a] -> out[*a]", values="move")


def test_a_rule_that_fails_is_not_taken_for_none() -> None:
    """The refusal said that the op has no rule, and kept to itself what was wrong with it."""

    @fxprune.rule("foreign::halves.default", values="moved")
    def rule_for_halves(op: fxprune.OpSite) -> None:
        op.tie_all(op.need("y"))

    said = r"2 more axes: the rule for foreign.halves.default does not cover this use \(.*halves has no tensor y\)"
    with pytest.raises(fxprune.FxpruneError, match=said):
        pruned_halves()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_rule_that_says_too_little_is_named_where_the_slim_graph_fails(memory: str) -> None:
    """An error of torch came out: the kept units are no multiple of a number among the arguments."""

    @fxprune.rule("foreign::halves", values="moved")
    def rule_for_halves(op: fxprune.OpSite) -> None:
        op.tie_all(op.need("x"))

    said = r"^halves \(foreign.halves.default\): the slim graph does not run: RuntimeError: .*op.size_argument"
    with pytest.raises(fxprune.FxpruneError, match=said):
        pruned_halves(memory=memory)


@foreign
def plus(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A sum."""
    return x + y


class Residual(nn.Module):
    """A block whose sum with the stream is an op of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return plus(x, self.down(self.up(x).relu()))


@pytest.mark.parametrize("adds", [False, True])
def test_blocks_end_in_a_sum_that_is_an_op_of_its_own(adds: bool) -> None:
    """The rule could not say so for a while, and there were no layers to remove."""
    fxprune.rule("foreign::plus", notation="x[*a], y[*a] -> out[*a]", values="pointwise", adds=adds)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(Residual() for _ in range(3))), nn.Linear(8, 4)).eval()
    graph = fxprune.dependency_graph(fxprune.trace(model, {"input": torch.randn(3, 4)}).graph_module)
    layers = [group.name for group in fxprune.find_groups(graph) if group.kind == "layer"]
    assert len(layers) == 3 * adds


@foreign
def picky(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, of which none is zero everywhere."""
    if not x.flatten(0, -2).any(0).all():
        raise ValueError("a channel is zero")
    return x.clone()


picky.register_fake(torch.empty_like)


def test_an_op_that_refuses_masked_values_is_named() -> None:
    fxprune.rule("foreign::picky", notation="x[*b, i] -> out[*b, i]", values="pointwise")
    model, inputs = between(picky)
    with pytest.raises(ValueError, match=r"(?s)a channel is zero.*While executing %picky.*foreign\.picky"):
        fxprune.prune(model, ratio=0.3, importance="l2", example_inputs=inputs, protect=())
