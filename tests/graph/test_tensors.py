"""Tensors, facts, counts of work, and private names of torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fxprune.errors import CalibrationError, PassError
from fxprune.graph.compat import (
    UNKNOWN_SIZE,
    clear_symbolic_caches,
    fake_mode,
    is_free,
    size_hint,
    size_range,
)
from fxprune.graph.counting import SampleSizes, Work, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import (
    Change,
    Fact,
    Facts,
    Notes,
    Source,
    add_note,
    facts_of,
    set_facts,
)
from fxprune.graph.tensors import (
    device_of,
    has_meta_weights,
    masked,
    names_by_identity,
    put,
    read_argument,
    require_weights,
    set_argument,
    take,
    tensors_of,
    weights,
    with_argument,
)
from fxprune.offload.files import write_values
from fxprune.trace.capture import trace
from tests.oracle import Net
from tests.remembered import traced


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.shift


def reading(module: nn.Module, *names: str) -> fx.GraphModule:
    """A graph that reads tensors of ``module`` in a given order."""
    graph = fx.Graph()
    graph.output([graph.get_attr(name) for name in names])
    return fx.GraphModule(module, graph)


def test_weights_are_those_the_graph_reads_and_refused_without_values() -> None:
    module = Tied()
    names = names_by_identity(module)
    assert names[id(module.a.weight)] == ("a.weight", "b.weight") and names[id(module.shift)] == ("shift",)
    graph_module = reading(module, "shift", "a.bias", "shift")
    assert [name for name, _ in weights(graph_module)] == ["shift", "a.bias"]
    assert device_of(graph_module) == torch.device("cpu")
    assert device_of(reading(module)) == torch.device("cpu")
    whole, empty = reading(Tied(), "a.bias"), reading(Tied().to("meta"), "a.bias")
    assert (has_meta_weights(whole), has_meta_weights(empty)) == (False, True)
    require_weights(whole, "some-pass")
    with pytest.raises(PassError, match=r"some-pass.*on meta"):
        require_weights(empty, "some-pass")


def test_values_are_read_and_written_where_they_stand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, [1, (2, 3)]), {"sizes": [4, 5]})
    assert read_argument(node, ("args", 1, 1, 0)) == 2
    assert read_argument(node, ("kwargs", "absent")) is None
    set_argument(node, ("args", 1, 1, 0), 7)
    set_argument(node, ("kwargs", "sizes", 1), 8)
    set_argument(node, ("kwargs", "end"), 9)
    assert node.args == (x, [1, (7, 3)])
    assert node.kwargs == {"sizes": [4, 8], "end": 9}
    assert with_argument((node.args, {}), ("args", 1, 0), 5)[0] == (x, [5, (7, 3)])
    assert node.args == (x, [1, (7, 3)])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("by_row", [False, True])
def test_entries_are_taken_put_back_and_masked_also_row_by_row(axis: int, by_row: bool) -> None:
    value = torch.randn(3, 4, 4)
    index = torch.tensor([[3, 1], [0, 2], [1, 2]])[: 3 if by_row else 1]
    if not by_row or axis == 0:
        index = index[0] % value.shape[axis]
    found = take(value, axis, index)
    rows = [value[i].index_select(axis - 1, index[i]) for i in range(3)] if index.dim() == 2 else []
    assert torch.equal(found, torch.stack(rows) if rows else value.index_select(axis, index))
    zeros = put(value, axis, index, torch.zeros_like(found))
    assert torch.equal(put(zeros, axis, index, found), value) and not take(zeros, axis, index).any()
    mask = torch.ones(*index.shape[:-1], value.shape[axis], dtype=torch.bool)
    mask.scatter_(-1, index, False)
    assert torch.equal(masked(value, axis, mask), zeros)


def test_the_tensors_of_an_output_class_come_in_the_order_of_its_fields_at_any_depth() -> None:
    """InternVL sets ``pooler_output`` last, though its class has it second: its graph seemed to be another model."""
    late = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(1), hidden_states=(torch.zeros(3),))
    late.pooler_output = torch.zeros(2)
    assert [len(tensor) for tensor in tensors_of({"first": torch.zeros(4), "rest": [late]})] == [4, 1, 2, 3]


def sizes(low: int | None = None) -> torch.Size:
    """The shape of an input whose first axis varies, and whose second does not."""
    program = torch.export.export(
        nn.Linear(6, 4), (torch.zeros(3, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=low, max=50)},)
    )
    node = next(node for node in program.graph.nodes if node.name == "input")
    return node.meta["val"].shape


def test_a_symbolic_size_is_free_and_has_a_hint_and_a_bound_unless_it_depends_on_data() -> None:
    batch, width = sizes()
    assert (is_free(batch), is_free(width)) == (True, False)
    assert (size_hint(batch), size_hint(width)) == (3, 6)
    assert (size_range(batch)[1], size_range(width)) == (50, (6, 6))
    with fake_mode():
        found = torch.zeros(5).nonzero().shape[0]
    assert is_free(found)
    assert size_hint(found) == UNKNOWN_SIZE


def test_nothing_is_remembered_of_a_trace_that_is_over() -> None:
    """Each trace left its symbols and all results on them, a megabyte or two, where no garbage collector looks."""
    start = ShapeEnv.__init__
    with clear_symbolic_caches():
        with clear_symbolic_caches():
            found = ShapeEnv()
            found.fake_tensor_cache["a call"] = "its result"  # type: ignore[index,assignment]
        assert found.fake_tensor_cache
    assert not found.fake_tensor_cache
    assert ShapeEnv.__init__ is start
    with clear_symbolic_caches():
        found.fake_tensor_cache["a later call"] = "its result"  # type: ignore[index,assignment]
    assert not found.fake_tensor_cache


@dataclass(frozen=True)
class Count(Fact):
    about: ClassVar[Change] = "graph"
    number: int


@dataclass(frozen=True)
class Sum(Fact):
    about: ClassVar[Change] = "weights"
    missing_error: ClassVar[type[PassError]] = CalibrationError
    remedy: ClassVar[str] = "Or add up by hand"
    total: float


def known(*facts: Fact) -> Facts:
    found = Facts()
    for fact in facts:
        found.put(fact)
    return found


@pytest.mark.parametrize(
    ("change", "left"), [("graph", {Notes}), ("weights", {Notes, Count}), ("nothing", {Notes, Count, Sum})]
)
def test_a_change_makes_stale_what_is_about_it(change: Change, left: set[type[Fact]]) -> None:
    facts = known(Notes(), Count(1), Sum(2.0))
    facts.drop_about(change, "some-pass")
    assert {type(fact) for fact in facts} == left
    facts.drop_about("graph", "some-pass", but=tuple(left))
    assert {type(fact) for fact in facts} == left


def test_notes_are_added_once_to_a_graph_that_is_known() -> None:
    graph_module = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(PassError, match=r"nothing is known.*fxprune\.trace"):
        facts_of(graph_module)
    set_facts(graph_module, Facts())
    for line in ("one", "two", "one"):
        add_note(graph_module, line)
    assert facts_of(graph_module)[Notes].lines == ("one", "two")


def test_values_are_put_into_the_tensor_of_the_model_only_if_it_is_to_change() -> None:
    for shares in (True, False):
        model = nn.Linear(3, 2)
        graph_module = trace(model, {"input": torch.randn(2, 3)}).graph_module
        held = facts_of(graph_module)[Source]
        facts_of(graph_module).put(dataclasses.replace(held, shares=shares))
        with torch.no_grad():
            write_values(graph_module, "weight", torch.ones(2, 3, dtype=torch.float64))
        assert bool((model.weight == 1).all()) == shares
        assert graph_module.weight.dtype == torch.float32 and bool((graph_module.weight == 1).all())


def test_matrix_products_of_one_sample_count_whatever_the_traced_batch() -> None:
    """The work of a sample without tokens was that of all samples of the example."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 7), b=nn.Linear(7, 3))
    graph_module = trace(net, {"x": torch.zeros(4, 5)}).graph_module
    assert count_macs(graph_module) == 5 * 7 + 7 * 3
    fixed = trace(net, {"x": torch.zeros(4, 5)}, dynamic=False).graph_module
    assert count_macs(fixed) == 4 * (5 * 7 + 7 * 3), "the graph takes no other batch"
    parameters = 5 * 7 + 7 + 7 * 3 + 3
    assert count_parameters(graph_module) == parameters
    work = Work(parameters, 5 * 7 + 7 * 3, 64, memory=4 * parameters, model="Net")
    assert facts_of(graph_module)[Work] == work, "recorded with the trace"


def test_tokens_scale_the_count_and_tied_weights_count_once() -> None:
    net = Net(lambda net, x: net.out(net.table(x)), table=nn.Embedding(11, 6), out=nn.Linear(6, 11, bias=False))
    net.out.weight = net.table.weight
    graph_module = trace(net, {"x": torch.zeros(2, 5, dtype=torch.long)}).graph_module
    assert count_macs(graph_module, tokens=8) == 8 * 6 * 11
    assert count_macs(graph_module) == 64 * 6 * 11
    assert count_parameters(graph_module) == 11 * 6
    assert count_bytes(graph_module) == 4 * 11 * 6 and count_bytes(graph_module.half()) == 2 * 11 * 6


class Attention(nn.Module):
    """Fused attention; key and value heads may be fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q * self.scale, k, v, enable_gqa=q.shape[1] > k.shape[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pairs", [6, 2])
def test_fused_attention_counts_as_its_two_products(device: str, pairs: int) -> None:
    sizes = {"q": (2, 6, 5, 8), "k": (2, pairs, 7, 8), "v": (2, pairs, 7, 8)}
    inputs = {name: torch.zeros(shape, device=device) for name, shape in sizes.items()}
    traced = trace(Attention().to(device), inputs, dynamic=False)
    assert count_macs(traced.graph_module) == 2 * 6 * 5 * 7 * (8 + 8)


def test_work_that_depends_on_data_is_unknown_without_values() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.a(x[(x.sum(dim=-1) >= 0).nonzero()[:, 0]])

    net = Net(body, a=nn.Linear(5, 7))
    x = {"x": torch.zeros(4, 5)}
    assert count_macs(trace(net, x).graph_module) % (5 * 7) == 0
    assert count_macs(trace(net.to("meta"), x).graph_module) == UNKNOWN_SIZE // 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_shapes_alone_count_what_a_run_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced(family)
    quick = [count_macs(graph_module, tokens) for tokens in (64, 7)]
    sizes = SampleSizes.of_sample(graph_module.graph)
    assert quick[0] == sum(map(sizes.operations, graph_module.graph.nodes)) // 2
    monkeypatch.setattr(SampleSizes, "operations", None)
    assert quick == [count_macs(graph_module, tokens) for tokens in (64, 7)]
