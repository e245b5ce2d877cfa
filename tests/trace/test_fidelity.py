"""Models that cannot be traced, inputs that keep their values, and graphs compared with their modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import GraphInputError, PassError, TraceError, UnsupportedModelError
from fxprune.graph.facts import facts_of
from fxprune.trace.fidelity import _TOLERANCE, Fidelity, SideBySide, compare_with_module, require_gradients, tolerance
from fxprune.trace.inputs import check_model, clear_quantisation_marks, is_marked_quantised, model_dtype
from tests.models import tiny
from tests.oracle import Net


def test_a_graph_of_a_language_model_is_the_model() -> None:
    found = facts_of(fxprune.trace(tiny("llama", num_hidden_layers=1)).graph_module)[Fidelity]
    assert found.error is not None and found.error <= 1e-6
    assert found.gradients is not None and found.gradients <= 1e-4
    assert found.unlike == () and found.where == "" and found.notes == ()
    assert tolerance(torch.float32) == tolerance(torch.float64) == 1e-5
    assert tolerance(torch.bfloat16) > tolerance(torch.float16) > 1e-3


def test_nothing_is_compared_on_meta_or_without_a_check() -> None:
    model = two()
    assert facts_of(fxprune.trace(model, X, check=False).graph_module)[Fidelity] == Fidelity(None)
    assert facts_of(fxprune.trace(model.to("meta"), X).graph_module)[Fidelity] == Fidelity(None)


def test_the_first_difference_of_outputs_is_named() -> None:
    model = two()
    graph_module = changed(model, torch.ops.aten.relu.default, torch.ops.aten.tanh.default)
    found = compare_with_module(graph_module, model, X)
    assert found.where.endswith(" in b") and found.error is not None and found.error > 0.01


def test_passes_that_need_gradients_refuse_those_that_differ() -> None:
    graph_module = fxprune.trace(two(), X).graph_module
    require_gradients(graph_module, "taylor")
    facts_of(graph_module).put(Fidelity(0.0, 1.0, ("a.weight", "a.bias")))
    with pytest.raises(PassError, match=r"pass taylor: the gradients of a\.weight and 1 more"):
        require_gradients(graph_module, "taylor")


X = {"x": torch.randn(2, 5, 3)}


def two() -> Net:
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def changed(model: nn.Module, old: object, new: object) -> fx.GraphModule:
    graph_module = fxprune.trace(model, X).graph_module
    for node in graph_module.graph.nodes:
        if node.target is old:
            node.target = new
    graph_module.recompile()
    return graph_module


def test_a_graph_and_its_module_are_the_same_to_the_last_digit() -> None:
    model = two()
    pair = SideBySide(fxprune.trace(model, X).graph_module, model, X)
    assert pair.error(pair.inputs) == 0
    second = pair.resized((3, 4))
    assert second is not None and second["x"].shape == (3, 4, 3) and pair.error(second) == 0
    found = pair.gradients()
    assert set(found) == {name for name, _ in model.named_parameters()} and max(found.values()) <= _TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_may_differ_though_values_are_the_same() -> None:
    model = two()
    graph_module = fxprune.trace(model, X).graph_module
    node = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.relu.default)
    with graph_module.graph.inserting_after(node):
        stopped = graph_module.graph.call_function(torch.ops.aten.detach.default, (node,))
    node.replace_all_uses_with(stopped, lambda user: user is not stopped)
    pair = SideBySide(graph_module, model, X)
    assert pair.error(pair.inputs) == 0
    assert {name for name, value in pair.gradients().items() if value > _TOLERANCE} == {"a.weight", "a.bias"}


def test_a_gradient_that_is_zero_but_for_rounding_is_compared_with_those_beside_it() -> None:
    """The key bias of a model that ran another kernel than its graph was said to have a backward of its own."""
    torch.manual_seed(0)
    query, key, value = (nn.Linear(8, 8) for _ in range(3))

    def attend(m: nn.Module, x: torch.Tensor, kernel: Callable[..., Any]) -> torch.Tensor:
        q, k, v = (getattr(m, name)(x)[:, None] for name in ("q", "k", "v"))
        return kernel(q, k, v)[:, 0]

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v

    def double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return written_out(q.double(), k.double(), v.double()).float()

    parts, inputs = {"q": query, "k": key, "v": value}, {"x": torch.randn(2, 5, 8)}
    model = Net(lambda m, x: attend(m, x, written_out), **parts)
    graph_module = fxprune.trace(Net(lambda m, x: attend(m, x, double), **parts), inputs).graph_module
    found = SideBySide(graph_module, model, inputs).gradients()
    assert "k.bias" in found and max(found.values()) <= 1e-3


def test_a_graph_that_fails_is_infinitely_far_and_a_module_that_fails_says_nothing() -> None:
    model = two()
    graph_module = fxprune.trace(model, X).graph_module
    pair = SideBySide(graph_module, model, X)
    assert pair.error({"x": torch.randn(2, 5, 9)}) is None
    broken = SideBySide(changed(model, torch.ops.aten.relu.default, torch.ops.aten.numpy_T.default), model, X)
    assert broken.error(broken.inputs) == float("inf")


class Sub(nn.Parameter):
    """A subclass of Parameter."""


def quantised(**tensors: torch.Tensor) -> nn.Module:
    """A layer that is marked as quantised, with some tensors of its own."""
    module = nn.Linear(2, 2)
    module.is_quantized = True  # type: ignore[assignment]
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor) if name == "packed" else setattr(module, name, tensor)
    return module


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (quantised(packed=torch.zeros(2, 2, dtype=torch.int32)), "packed: torch.int32 of shape"),
        (quantised(weight=Sub(torch.ones(2, 2))), "weight: a Sub is a quantised weight"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_model(model)


def test_a_weight_of_no_tokens_is_no_shard() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat((m.first, m.none, m.a(x)[None]), 1)
        return m.b(tokens.relu())  # type: ignore[no-any-return]

    parts: dict[str, Any] = {"first": nn.Parameter(torch.ones(1, 1, 6)), "none": nn.Parameter(torch.ones(1, 0, 6))}
    net = Net(body, a=nn.Linear(3, 6), b=nn.Linear(6, 2), **parts)
    found = fxprune.prune(net, ratio=0.1, importance="l2", kinds=("mlp",), example_inputs={"x": torch.ones(4, 3)})
    assert found.graph_module.get_parameter("none").shape == (1, 0, 5)


def test_a_mark_alone_does_not_make_a_model_quantised() -> None:
    """A model read from a GGUF file is plain floats, and was once refused for its mark."""
    model = tiny("llama", num_hidden_layers=1)
    model.is_quantized, model.hf_quantizer = True, object()
    model.config.quantization_config = {"quant_method": "gguf"}
    check_model(model)
    assert is_marked_quantised(model)
    slim = fxprune.prune(model, importance="l2", protect=()).model
    assert not is_marked_quantised(slim) and "quantization_config" not in slim.config.to_dict()
    assert is_marked_quantised(model) and model.config.quantization_config
    clear_quantisation_marks(model)
    assert not is_marked_quantised(model)


def test_the_dtype_of_a_model_is_that_of_most_elements() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8), nn.LayerNorm(8))
    check_model(model)
    assert model_dtype(model) == torch.bfloat16


class GridNet(nn.Module):
    """Pools as many patches of an image as a grid says, through an MLP, and adds tokens."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, input_ids: torch.Tensor, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Tokens ``(samples, tokens)``, patches ``(patches, 4)`` and rows and columns ``(samples, 2)``."""
        places = (torch.arange(int(grid.prod(-1).sum())) * 0.5).to(patches.dtype)  # a cast to the weights' dtype
        hidden = self.down(self.up(patches + places[:, None]).relu())
        images = torch.stack([part.mean(0) for part in torch.split(hidden, grid.prod(-1).tolist())])
        return self.table(input_ids) + images[:, None]


def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids, patches = torch.randint(11, (2, 3), generator=draw), torch.randn(6, 4, generator=draw)
    return {"input_ids": ids, "patches": patches, "grid": torch.tensor([[2, 2], [1, 2]])}


def test_a_grid_keeps_its_values_and_the_graph_refuses_others() -> None:
    """``grid.tolist()`` was refused: vision-language models of many families read their grids so."""
    net = GridNet().eval()
    traced = fxprune.trace(net, inputs())
    assert "runs at the values of grid that it was traced with" in traced.notes
    torch.testing.assert_close(traced.graph_module(**inputs()), net(**inputs()))
    with pytest.raises(GraphInputError, match="with the values of grid in its example"):
        traced.graph_module(**inputs() | {"grid": torch.tensor([[1, 2], [2, 2]])})


def test_a_model_with_a_grid_is_pruned() -> None:
    result = fxprune.prune(
        GridNet().eval(), example_inputs=inputs(), importance="l2", recipe="llm-pruner", ratio=0.1, protect=()
    )
    assert result.graph_module.get_parameter("up.weight").shape[0] < 8
    assert result.graph_module(**inputs()).shape == (2, 3, 6)


def test_a_graph_with_a_grid_is_cast() -> None:
    """What the grid gives was cast to the dtype of the trace for good, if it was computed outside of the graph."""
    traced = fxprune.trace(GridNet().eval(), inputs()).graph_module
    given = inputs() | {"patches": inputs()["patches"].double()}
    assert traced.double()(**given).dtype == torch.float64


class ListNet(nn.Module):
    """Looks its tokens up by a list of them."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(6) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.rows[token] for token in input_ids[0].tolist()])


def test_tokens_never_keep_their_values() -> None:
    """A graph that holds for one text alone is of no use."""
    with pytest.raises(TraceError):
        fxprune.trace(ListNet().eval(), {"input_ids": torch.tensor([[1, 2, 3]])})


def test_a_module_that_rescales_its_weights_in_its_first_run_is_traced_after_that_run() -> None:
    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.rescaled = nn.Linear(6, 8), nn.Linear(8, 6), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.rescaled:
                with torch.no_grad():
                    self.down.weight.div_(2)
                self.rescaled = True
            y: torch.Tensor = self.down(self.up(x).relu())
            return y

    model, inputs = Rescaled(), {"x": torch.randn(2, 6)}
    before = model.down.weight.detach().clone()
    with pytest.raises(TraceError, match="run the model once before") as caught:
        fxprune.trace(model, inputs)
    assert "from Python" in caught.value.shell and torch.equal(model.down.weight, before)
    with torch.no_grad():
        model(**inputs)
    assert fxprune.trace(model, inputs).graph_module is not None


def test_a_bound_on_the_rows_of_a_table_is_traced() -> None:
    """It writes to the table in each run, and changes nothing when repeated."""
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 8)).eval()
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    graph_module = fxprune.trace(model, {"input": x}).graph_module
    assert torch.equal(graph_module(x), model(x))
