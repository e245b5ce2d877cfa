"""Repeated blocks: one of each group is exported, and the graph is the same as without that."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.graph.context import current_tracer
from fxprune.trace.capture import Traced
from fxprune.trace.repeats import copies
from fxprune.trace.repeats.copies import skip_repeats
from fxprune.trace.repeats.grouping import Dependence, find_dependence, find_repeats, record_calls
from tests.models import tiny
from tests.oracle import Net
from tests.tiers import tiers

CAPTURE = sys.modules["fxprune.trace.capture"]
DEPTH = 6
X = {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))}


class Block(nn.Module):
    """A block whose forward is a function of itself and its input."""

    def __init__(self, body: Callable[..., Any], number: int, shared: Any) -> None:
        super().__init__()
        self.body, self.number, self.shared = body, number, shared
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 6)
        self.register_buffer("shift", torch.full((6,), float(number)))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, x, *args, **kwargs)


class Shared:
    """State that all blocks of a model share."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[torch.Tensor] = []
        self.table = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, *[1.0] * 200]

    def counted(self) -> int:
        self.count += 1
        return self.count

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return x


def run(model: Any, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x


class Stack(nn.Module):
    """Some blocks, and the function that calls them."""

    def __init__(self, body: Any, call: Callable[[Any, torch.Tensor], Any] = run, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.state = call, Shared()
        self.blocks = nn.ModuleList(Block(body, i, self.state) for i in range(depth))
        self.head = nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> Any:
        self.state.count, self.state.kept = 0, []
        return self.head(self.call(self, x))


def mlp(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.b(F.silu(m.a(x))) + m.shift


@contextmanager
def counted() -> Iterator[list[str]]:
    """The blocks that are copied."""
    made: list[str] = []
    copy = copies._copy

    def recorded(source: Any, here: Any, images: Any) -> Any:
        made.append(here.stack[-1][0])
        return copy(source, here, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_copy", recorded)
        yield made


def plainly(model: nn.Module, inputs: Mapping[str, Any] | None, dynamic: bool, check: bool) -> Traced:
    """A trace that exports every block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CAPTURE, "find_repeats", lambda *_: None)
        return fxprune.trace(model, inputs, dynamic=dynamic, check=check)


def rows(traced: Traced) -> list[tuple[str, ...]]:
    """Everything about each node."""
    nodes = traced.graph_module.graph.nodes
    found = ((n.op, n.target, n.args, n.kwargs, n.name, *map(n.meta.get, ("val", "nn_module_stack"))) for n in nodes)
    return [tuple(map(str, row)) for row in found]


def copied(model: nn.Module, inputs: Mapping[str, Any] | None = None, dynamic: bool = True, check: bool = False) -> int:
    """The number of copied blocks; checks that the graph is the same as without copies."""
    with counted() as made:
        short = fxprune.trace(model, inputs, dynamic=dynamic, check=check)
    plain = plainly(model, inputs, dynamic, check)
    assert rows(short) == rows(plain)
    assert short.notes == plain.notes
    return len(made)


def copied_stack(body: Callable[..., Any], call: Callable[[Any, torch.Tensor], Any] = run, dynamic: bool = True) -> int:
    return copied(Stack(body, call).eval(), X, dynamic)


# one family of each structure: rotary, two kinds of blocks, learnt positions, alibi, experts, groups of unequal size;
# until transformers 5.25, Falcon's blocks made tensors of numbers
FAMILIES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "llama": ({"num_hidden_layers": 4}, False, 2),
    "gemma3_text": ({"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}, True, 2),
    "gpt2": ({"n_layer": 4}, True, 2),
    "bloom": ({"n_layer": 4}, True, 2),
    "mixtral": ({"num_hidden_layers": 4}, True, 2),
    "smollm3": ({"num_hidden_layers": 7, "no_rope_layers": [1, 1, 1, 1, 0, 0, 0]}, True, 3),
    "falcon": ({"num_hidden_layers": 4}, False, 2 if Version(transformers.__version__) >= Version("5.25") else 0),
}


@pytest.mark.parametrize("family", tiers(FAMILIES, "gpt2"))
def test_the_graph_of_a_family_is_the_same(family: str) -> None:
    config, dynamic, count = FAMILIES[family]
    assert copied(tiny(family, **config).to("meta"), dynamic=dynamic) == count


@pytest.mark.slow
def test_the_graph_in_another_dtype_is_the_same() -> None:
    model = tiny("llama", num_hidden_layers=4)
    assert copied(model.train().bfloat16(), check=True) == 2


def twice(m: Any, x: torch.Tensor) -> Any:
    return mlp(m, x), None, {"same": x}


def run_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    for block in m.blocks:
        x, _, rest = block(x, None, mask=None)
        x = x + rest["same"]
    return x


ALIKE: dict[str, tuple[Callable[..., Any], Callable[[Any, torch.Tensor], Any]]] = {
    "plain": (mlp, run),
    "a tuple, a dict, None and an input": (lambda m, x, _, mask: twice(m, x), run_twice),
    "a number of all": (lambda m, x: mlp(m, x) * m.shared.table[0], run),
    "in place on its own": (lambda m, x: mlp(m, x).relu_().add_(1), run),
    "a view of its own": (lambda m, x: mlp(m, x).transpose(0, 1).contiguous().transpose(0, 1)[..., :6], run),
    "detached": (lambda m, x: x + m.b(F.silu(m.a(x))).detach().relu(), run),
    "without gradients": (lambda m, x: x + torch.no_grad()(lambda: m.b(m.a(x).relu()))(), run),
    "random numbers": (lambda m, x: mlp(m, x) + torch.randn_like(x), run),
    "sizes": (lambda m, x: mlp(m, x.reshape(x.shape[0] * x.shape[1], 6)).reshape(x.shape[0], x.shape[1], 6), run),
    "halves": (lambda m, x: torch.cat([mlp(m, x[:, : x.shape[1] // 2]), x[:, x.shape[1] // 2 :]], 1), run),
    "outputs of all at the end": (mlp, lambda m, x: torch.stack([x := block(x) for block in m.blocks]).sum(0)),
}


@pytest.mark.parametrize("name", tiers(ALIKE, *list(ALIKE)[::3]))
def test_blocks_that_are_alike_are_copied(name: str) -> None:
    assert copied_stack(*ALIKE[name]) >= DEPTH - 3


def test_blocks_that_are_alike_are_copied_at_static_sizes() -> None:
    assert copied_stack(*ALIKE["halves"], dynamic=False) >= DEPTH - 3


def run_and_add_kept(m: Any, x: torch.Tensor) -> torch.Tensor:
    return run(m, x) + sum(kept.sum() for kept in m.state.kept)  # type: ignore[no-any-return]


UNLIKE: dict[str, tuple[Callable[..., Any], Callable[[Any, torch.Tensor], Any]]] = {
    "a number of each": (lambda m, x: mlp(m, x) * m.shared.table[m.number], run),
    "a number of each, 0 or -0": (lambda m, x: mlp(m, x) + (0.0, -0.0, 1.0)[m.number % 3], run),
    "a branch on the number": (lambda m, x: (F.relu, F.silu, torch.tanh)[m.number % 3](mlp(m, x)), run),
    "a place of each": (lambda m, x: torch.cat([mlp(m, x)[..., m.number :], x[..., : m.number]], -1), run),
    "a constant of each": (lambda m, x: mlp(m, x) * torch.tensor(m.shared.table[m.number]), run),
    "a count": (lambda m, x: mlp(m, x) * m.shared.counted(), run),
    "a count for the rest": (lambda m, x: (m.shared.counted(), mlp(m, x))[1], lambda m, x: run(m, x) * m.state.count),
    "what blocks keep": (lambda m, x: x + m.b(m.shared.keep(F.silu(m.a(x)))), run_and_add_kept),
    "a view that blocks keep": (lambda m, x: (m.shared.keep((y := mlp(m, x)).mT), y * 2)[1], run_and_add_kept),
    "the input of the first block": (lambda m, x: (m.shared.keep(x), mlp(m, x) + m.shared.kept[0])[1], run),
    "blocks called twice": (mlp, lambda m, x: run(m, run(m, x))),
    "a block in a block": (lambda m, x, inner: inner(mlp(m, x)), lambda m, x: _nested(m.blocks, x)),
    "writes to its input": (lambda m, x: mlp(m, x.add_(1)), lambda m, x: run(m, x * 1)),
    "writes to its input by a view": (lambda m, x: (x[:, :1].mul_(2), mlp(m, x))[1], lambda m, x: run(m, x * 1)),
}


def _nested(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    inner: Callable[[torch.Tensor], torch.Tensor] = lambda y: y  # noqa: E731
    for block in blocks:
        inner = partial(block, inner=inner)
    return inner(x)


@pytest.mark.parametrize("name", tiers(UNLIKE, *list(UNLIKE)[::3]))
def test_blocks_that_are_not_alike_are_exported_by_themselves(name: str) -> None:
    assert copied_stack(*UNLIKE[name]) == 0


def test_blocks_that_ask_otherwise_about_sizes_are_exported_by_themselves() -> None:
    """Each block branches on another number of tokens, and takes the same branch at five."""

    def asks(m: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(m, x).relu() if x.shape[1] > 10 * (m.number + 1) else mlp(m, x)

    copied_stack(asks)
    assert copied_stack(asks, dynamic=False) == DEPTH - 3


def test_blocks_with_thresholds_or_weights_of_others_are_not_alike() -> None:
    def asks(m: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(m, x).relu() if x.shape[1] > m.limit else mlp(m, x)

    model, reading = Stack(asks).eval(), Stack(lambda m, x: mlp(m, x) * m.other[0].weight.sum()).eval()
    for i, (block, other) in enumerate(zip(model.blocks, reading.blocks, strict=True)):
        block.limit, other.other = 100 + (7 * i) % 4, [reading.blocks[0].a]
    assert copied(model, X) == copied(reading, X) == 0


def test_modules_that_blocks_hold_as_plain_attributes_are_compared() -> None:
    """Transformers holds modules around functions this way, one in each block."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(m, x) * m.held["scale"].factor

    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

    def held(*factors: float) -> nn.Module:
        model = Stack(body).eval()
        for block, factor in zip(model.blocks, factors, strict=True):
            vars(block)["held"] = {"scale": Scale(factor)}
        return model

    assert copied(held(*[2.0] * DEPTH), X) == DEPTH - 3
    model = held(*[2.0] * DEPTH)
    vars(model.blocks[3])["held"]["scale"].limit = 100
    assert copied(model, X) == DEPTH - 4
    assert copied(held(*range(DEPTH)), X) == 0


def test_weights_that_blocks_share_are_shared_in_the_graph() -> None:
    model = Stack(mlp).eval()
    for block in model.blocks:
        block.a.weight = model.blocks[0].a.weight
    assert copied(model, X, check=True) == DEPTH - 3
    model.blocks[3].b.bias.requires_grad_(False)
    assert copied(model, X) == DEPTH - 4


def test_blocks_of_other_widths_are_not_alike_and_modules_with_two_names_are_left_to_torch() -> None:
    model = Stack(mlp).eval()
    model.blocks[2].a, model.blocks[2].b = nn.Linear(6, 11), nn.Linear(11, 6)
    assert copied(model, X) == DEPTH - 4
    model.blocks[1].a = model.blocks[0].a
    assert copied(model, X) == 0


def test_what_differs_in_training_only_is_seen() -> None:
    model = Stack(lambda m, x: mlp(m, x) + F.dropout(x, m.rate, m.training))
    for i, block in enumerate(model.blocks):
        block.rate = 0.1 * i
    traced = fxprune.trace(model, X)
    assert "dropout" in traced.notes[-1]
    model = Stack(lambda m, x: mlp(m, x) + F.dropout(x, 0.1, m.training)).eval()
    model.blocks[3].train()
    assert "dropout" in fxprune.trace(model, X).notes[-1]


def test_the_code_of_three_of_many_blocks_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran, forward = Stack(mlp, depth=40).eval(), [], Block.forward

    def recorded(self: Any, x: torch.Tensor) -> Any:
        if current_tracer() is not None:
            ran.append(self.number)
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", recorded)
    traced = fxprune.trace(model, X, check=False)
    assert ran == [0, 1, 39]
    read = [str(n.target) for n in traced.graph_module.graph.nodes if n.op == "get_attr"]
    assert read[-7:-2] == [f"blocks.39.{name}" for name in ("a.weight", "a.bias", "b.weight", "b.bias", "shift")]
    assert len(read) == 40 * 5 + 2


def test_a_last_block_unlike_the_source_discards_all_copies() -> None:
    """The last block behaves differently only while it is exported."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(m, x).relu() if m.number == DEPTH - 1 and current_tracer() is not None else mlp(m, x)

    model = Stack(body).eval()
    with counted() as made:
        short = fxprune.trace(model, X, check=False)
    assert len(made) == DEPTH - 3
    assert rows(short) == rows(plainly(model, X, True, False))


def test_a_dry_run_finds_the_repeats_and_leaves_out_the_calls_of_skipped_blocks() -> None:
    model, inputs = Stack(mlp).eval(), {"x": torch.ones(2, 5, 6)}
    found = find_repeats(model, inputs, torch.float32)
    assert found is not None and found.repeats == (tuple(f"blocks.{i}" for i in range(DEPTH)),)
    expected = model(**inputs)
    skip_repeats(model, found.repeats)
    assert torch.equal(model(**inputs), expected), "outside of an export all blocks run"
    model = Stack(mlp).eval()
    full = record_calls(model, inputs, torch.float32, torch.float32)
    assert full is not None and len(found.calls) < len(full)
    assert find_repeats(Stack(lambda m, x: x.sum().item() * x), inputs, torch.float32) is None


FOLLOWS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a product": lambda m, x: m.a(x),
    "a mask": lambda m, x: m.a(x).masked_fill(m.a(x) < 0, torch.finfo(x.dtype).min),
    "up and back": lambda m, x: m.a(x).float().to(x.dtype),
    "a number": lambda m, x: m.a(x) * 0.3,
}

DEPENDS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "an eps": lambda m, x: m.a(x) + torch.finfo(x.dtype).eps,
    "a branch": lambda m, x: m.a(x).relu() if x.dtype == torch.float32 else m.a(x),
    "a cast": lambda m, x: m.a(x).to(torch.bfloat16).to(x.dtype),
    "its bytes": lambda m, x: m.a(x) * x.element_size(),
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda m, x: m.a(x) * 2),
}


def first(body: Callable[[Any, torch.Tensor], torch.Tensor]) -> str:
    model, arguments = Net(body, a=nn.Linear(3, 4)), ({"x": torch.ones(2, 3)}, torch.float32, torch.bfloat16)
    found = find_dependence(model.eval(), *arguments)
    assert not found.mode and find_dependence(model.train(), *arguments) == found
    return found.dtype


def test_code_that_only_follows_the_dtype_does_not_depend_on_it() -> None:
    assert {name: first(body) for name, body in FOLLOWS.items()} == dict.fromkeys(FOLLOWS, "")
    assert first(lambda m, x: m.b(x)) == "", "a module that does not run is left to tracing"


def test_dependence_on_the_dtype_is_named_by_the_first_call_that_differs() -> None:
    assert [name for name, body in DEPENDS.items() if "torch." not in first(body)] == []


@pytest.mark.parametrize(
    ("body", "call"),
    [
        (lambda m, x: m.drop(m.a(x)), "dropout"),
        (lambda m, x: torch.nn.functional.dropout(m.a(x), 0.5, m.training), "dropout"),
        (lambda m, x: m.a(x).relu() if m.training else m.a(x), "relu"),
        (lambda m, x: m.norm(m.a(x)), "batch_norm"),
        (lambda m, x: torch.nn.functional.dropout(m.a(x), p=0.0, training=m.training), ""),
        (lambda m, x: m.a(x).relu(), ""),
    ],
    ids=["module", "function", "branch", "batch norm", "idle dropout", "none"],
)
def test_what_differs_in_training_is_named(body: Callable[[Any, torch.Tensor], torch.Tensor], call: str) -> None:
    model = Net(body, a=nn.Linear(3, 4), drop=nn.Dropout(0.5), norm=nn.BatchNorm1d(4))
    inputs = {"x": torch.ones(2, 3)}
    for other in (torch.float32, torch.bfloat16):
        found = find_dependence(model.train(), inputs, torch.float32, other)
        assert call in found.mode and bool(found.mode) == bool(call) and not found.dtype
        assert find_dependence(model.eval(), inputs, torch.float32, other) == Dependence()
