"""The memory of traces: models that are the same share one, a difference in anything that counts does not."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, activations, masking_utils, modeling_utils
from transformers.models.llama import modeling_llama

from fxprune.graph.compat import fake_mode
from fxprune.graph.facts import Source, facts_of
from fxprune.graph.tensors import get_tensor
from fxprune.trace.inputs import fake_twin
from tests import exports
from tests.exports import Exports, Traces, remember_exports
from tests.models import tiny, token_ids

X = torch.randn(2, 6)


class Shifted(nn.Module):
    """Adds a constant that is not part of its state; a program keeps it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def small(**changes: Any) -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1, **changes)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exports]:
    made = Exports(remember_exports().export)
    monkeypatch.setattr(torch.export, "export", made)
    return made


@pytest.fixture
def traces(memory: Exports) -> Traces:
    return Traces(exports.capture.trace.__wrapped__, memory)


def key(model: nn.Module, dtype: torch.dtype = torch.bfloat16, **more: Any) -> object:
    """The key of a module as tracing exports it."""
    twin = fake_twin(model, fake_mode(), torch.float32, dtype)
    return remember_exports().key_of(twin, (), {"input_ids": token_ids(), **more})


def test_what_is_the_same_shares_a_program_and_computes_with_its_own_weights(memory: Exports, traces: Traces) -> None:
    first, second = net(), net()
    graphs = [traces(module, {"input": X}).graph_module for module in (first, second)]
    assert (memory.made, memory.found, traces.made) == (1, 1, 2)
    memory.fresh = True
    anew = traces(second, {"input": X}).graph_module
    assert (memory.made, memory.found) == (2, 1)
    assert str(graphs[1].graph) == str(anew.graph) and graphs[1].code == anew.code
    for module, graph in zip((first, second), graphs, strict=True):
        assert get_tensor(graph, "0.weight") is module[0].weight  # type: ignore[index]
        torch.testing.assert_close(graph(X), module(X))


def test_a_trace_is_shared_by_models_of_the_same_weights_and_bound_to_each(traces: Traces) -> None:
    first, second, other = small(), small(), small()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    found = [traces(model) for model in (first, second, other)]
    assert (traces.made, traces.found) == (2, 1)
    for model, traced in zip((first, second, other), found, strict=True):
        source = facts_of(traced.graph_module)[Source]
        assert source.model is model is traced.model and source.shares
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        assert {id(parameter) for parameter in traced.graph_module.parameters()} <= own
        assert torch.equal(traced.graph_module(token_ids()).logits, model(token_ids()).logits)
    assert found[0].graph_module.code == found[1].graph_module.code


CONFIGS: list[dict[str, Any]] = [
    *({"hidden_act": "gelu"}, {"rms_norm_eps": 1e-3}, {"attn_implementation": "eager"}, {"tie_word_embeddings": True}),
    *({"attention_bias": True}, {"intermediate_size": 80}),
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
]

CHANGES: dict[str, Callable[[Any], object]] = {
    "frozen": lambda model: model.lm_head.weight.requires_grad_(False),
    "attribute": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.3),
    "other part": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
    "hook": lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
    "width": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight[:-1])),
    "tied": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
}


def test_a_local_class_seen_before_does_not_count() -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    before = key(small())
    assert key(Local()) is None, "code of one test is exported as ever"
    assert before is not None and key(small()) == before


def test_configs_and_the_state_of_every_part_count() -> None:
    first, second = small(), small()
    nn.init.normal_(second.lm_head.weight)
    second.model.rotary_emb.inv_freq.mul_(2)
    second.config._name_or_path = "elsewhere"
    before = key(first)
    assert before is not None and before == key(second), "weights and buffers have no numbers when exported"
    assert [changes for changes in CONFIGS if key(small(**changes)) in (None, before)] == []
    for name, change in CHANGES.items():
        model = small()
        change(model)
        assert key(model) != before, name


def test_arguments_and_modes_of_torch_count() -> None:
    model, auto, dynamic = small(), torch.export.Dim.AUTO, "dynamic_shapes"
    twin = fake_twin(model, fake_mode(), torch.float32, torch.bfloat16)
    given: list[dict[str, Any]] = [
        *({}, {"dtype": torch.float32}, {"input_ids": token_ids(3)}, {"input_ids": token_ids().int()}),
        *({"use_cache": False}, {"attention_mask": torch.ones(2, 9)}, {"attention_mask": torch.zeros(2, 9)}),
        *({dynamic: {"input_ids": {0: auto}}}, {dynamic: {"input_ids": {0: auto, 1: auto}}}),
    ]
    modes = [
        *(nullcontext(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16)),
        *(torch.device("meta"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)),
    ]
    found = [key(model, **arguments) for arguments in given]
    for mode in modes:
        with mode:
            found.append(remember_exports().key_of(twin, (), {}))
    assert None not in found and len(set(found)) == len(found)


PATCHED: list[tuple[Any, str]] = [
    *((modeling_llama, "eager_attention_forward"), (modeling_llama.LlamaMLP, "forward"), (nn.Linear, "forward")),
    *((masking_utils, "sdpa_mask"), (torch.nn.functional, "silu"), (torch, "cat"), (torch.Tensor, "transpose")),
    *((modeling_llama.LlamaRotaryEmbedding, "compute_default_rope_parameters"), (exports.capture, "lower")),
]


def test_patched_functions_and_registries_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = key(model)
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
        patched = key(model)
        monkeypatch.undo()
        assert None not in (before, patched) and patched != before and key(model) == before, name
    for registry, entry in ((modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa"), (activations.ACT2FN, "silu")):
        monkeypatch.setitem(registry, entry, nn.Tanh)
        assert key(model) != before, entry
        monkeypatch.undo()


def test_what_may_change_unseen_is_exported_as_ever(memory: Exports, traces: Traces) -> None:
    class Local(nn.Linear):
        pass

    for module in (Local(6, 4), nn.Sequential(Shifted()), nn.Sequential(Local(6, 4))):
        assert memory.key_of(module, (X,), {}) is None
        for _ in range(2):
            traces(nn.Sequential(nn.Linear(6, 6), module), {"input": X})
    assert memory.found == traces.found == 0 and memory.made == 6


def test_a_program_whose_sizes_were_fixed_since_is_not_given_again(memory: Exports, traces: Traces) -> None:
    module = net()
    graph = traces(module, {"input": X}).graph_module
    size = next(node for node in graph.graph.nodes if node.op == "call_function").meta["val"].shape[0]
    assert bool(size == 2), "a question, and from now on it is 2"
    again = traces(module, {"input": X}).graph_module
    assert (memory.made, memory.found, traces.found) == (2, 0, 0)
    for rows in (2, 5):
        assert again(torch.randn(rows, 6)).shape == (rows, 3)
    traces(net(), {"input": X})
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
