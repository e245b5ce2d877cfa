"""The memory of exported programs: what is the same shares one, what differs in anything that counts does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, activations, masking_utils, modeling_utils
from transformers.models.llama import modeling_llama

from fxprune.graph.compat import fake_mode
from fxprune.graph.tensors import get_tensor
from fxprune.trace import trace
from fxprune.trace.inputs import fake_twin
from tests import exports
from tests.exports import Exports, remember_exports
from tests.models import tiny, token_ids

X = torch.randn(2, 6)


class Shifted(nn.Module):
    """Adds a constant that is no part of its state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A program keeps the constant."""
        return x.sin() + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def small(**changes: Any) -> PreTrainedModel:
    """A model of one layer."""
    return tiny("llama", num_hidden_layers=1, **changes)


def net() -> nn.Module:
    """A module that exports in no time."""
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exports]:
    """A memory that knows nothing yet."""
    made = Exports(remember_exports().export)
    monkeypatch.setattr(torch.export, "export", made)
    return made


def key(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, kwargs: dict[str, Any] | None = None, **more: Any
) -> object:
    """The key of a module as tracing exports it."""
    twin = fake_twin(model, fake_mode(), torch.float32, dtype)
    return remember_exports().key_of(twin, (), {"input_ids": token_ids(), **(kwargs or {}), **more})


def test_what_is_the_same_shares_a_program_and_computes_with_its_own_weights(memory: Exports) -> None:
    first, second = net(), net()
    graphs = [trace(module, {"input": X}).graph_module for module in (first, second)]
    assert (memory.made, memory.found) == (1, 1)
    memory.fresh = True
    anew = trace(second, {"input": X}).graph_module
    assert (memory.made, memory.found) == (2, 1)
    assert str(graphs[1].graph) == str(anew.graph) and graphs[1].code == anew.code
    for module, graph in zip((first, second), graphs, strict=True):
        assert get_tensor(graph, "0.weight") is module[0].weight  # type: ignore[index]
        torch.testing.assert_close(graph(X), module(X))


def test_the_key_is_the_same_for_models_that_differ_in_numbers_alone() -> None:
    """Weights and buffers have no numbers when a module is exported."""
    first, second = small(), small()
    nn.init.normal_(second.lm_head.weight)
    second.model.rotary_emb.inv_freq.mul_(2)
    second.config._name_or_path = "elsewhere"
    assert key(first) is not None and key(first) == key(second)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"attn_implementation": "eager"},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"intermediate_size": 80},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_counts(changes: dict[str, Any]) -> None:
    assert key(small(**changes)) not in (None, key(small()))


def _frozen(model: PreTrainedModel) -> None:
    model.lm_head.weight.requires_grad_(False)


def _attribute(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling = 0.3


def _other_part(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def _hook(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def _width(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:-1])


def _tied(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize("change", [_frozen, _attribute, _other_part, _hook, _width, _tied])
def test_the_state_of_every_part_counts(change: Callable[[PreTrainedModel], None]) -> None:
    model = small()
    before = key(model)
    change(model)
    assert key(model) != before


def test_what_a_module_is_called_with_counts() -> None:
    model, auto = small(), torch.export.Dim.AUTO
    found = [
        key(model),
        key(model, torch.float32),
        key(model, input_ids=token_ids(3)),
        key(model, input_ids=token_ids().int()),
        key(model, use_cache=False),
        key(model, attention_mask=torch.ones(2, 9)),
        key(model, attention_mask=torch.zeros(2, 9)),
        key(model, dynamic_shapes={"input_ids": {0: auto}}),
        key(model, dynamic_shapes={"input_ids": {0: auto, 1: auto}}),
    ]
    assert None not in found and len(set(found)) == len(found)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        lambda: torch.device("meta"),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ],
)
def test_modes_of_torch_count(mode: Callable[[], AbstractContextManager[None]]) -> None:
    twin = fake_twin(small(), fake_mode(), torch.float32, torch.bfloat16)
    found = []
    for entered in (nullcontext, mode):
        with entered():
            found.append(remember_exports().key_of(twin, (), {}))
    assert None not in found and found[0] != found[1]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_llama, "eager_attention_forward"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama.LlamaRotaryEmbedding, "compute_default_rope_parameters"),
        (nn.Linear, "forward"),
        (masking_utils, "sdpa_mask"),
        (torch.nn.functional, "silu"),
        (torch, "cat"),
        (torch.Tensor, "transpose"),
    ],
)
def test_a_function_that_is_patched_is_another_one(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = key(model)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    patched = key(model)
    monkeypatch.undo()
    assert None not in (before, patched) and patched != before and key(model) == before


@pytest.mark.parametrize(
    ("registry", "entry"), [(modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa"), (activations.ACT2FN, "silu")]
)
def test_registries_count(registry: Any, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = key(model)
    monkeypatch.setitem(registry, entry, nn.Tanh)
    assert key(model) != before


def test_what_may_change_unseen_is_exported_as_ever(memory: Exports) -> None:
    class Local(nn.Linear):
        pass

    for module in (Local(6, 4), nn.Sequential(Shifted()), nn.Sequential(Local(6, 4))):
        assert memory.key_of(module, (X,), {}) is None
        for _ in range(2):
            trace(nn.Sequential(nn.Linear(6, 6), module), {"input": X})
    assert memory.found == 0 and memory.made == 6


def test_a_program_whose_sizes_were_fixed_since_is_not_given_again(memory: Exports) -> None:
    graph = trace(net(), {"input": X}).graph_module
    size = next(node for node in graph.graph.nodes if node.op == "call_function").meta["val"].shape[0]
    assert bool(size == 2), "a question, and from now on it is 2"
    again = trace(net(), {"input": X}).graph_module
    assert (memory.made, memory.found) == (2, 0)
    for rows in (2, 5):
        assert again(torch.randn(rows, 6)).shape == (rows, 3)
    trace(net(), {"input": X})
    assert (memory.made, memory.found) == (2, 1)


def test_a_constant_belongs_to_its_graph(memory: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs of one program share no tensor, so that what is written to one is not seen in the other."""
    monkeypatch.setattr(exports, "_LASTING", exports._LASTING | {"tests"})
    module = nn.Sequential(nn.Linear(6, 6), Shifted())
    programs = [torch.export.export(module, (X,)) for _ in range(2)]
    assert (memory.made, memory.found) == (1, 1)
    (mine,), (others,) = (list(program.constants.values()) for program in programs)
    assert torch.equal(mine, others)
    mine.zero_()
    assert others.tolist() == [1, 2, 3, 4, 5, 6] and torch.equal(programs[1].module()(X), module(X))
    (new,) = torch.export.export(module, (X,)).constants.values()
    assert new.tolist() == [1, 2, 3, 4, 5, 6]
