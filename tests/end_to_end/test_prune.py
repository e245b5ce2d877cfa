"""The public surface on a small model: what a user relies on."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxprune
from fxprune.graph.tensors import weights
from fxprune.recipes import Options, option_table
from tests.models import VOCABULARY, tiny, token_ids
from tests.remembered import pruned


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def result(model: PreTrainedModel) -> fxprune.Result:
    return fxprune.prune(model, token_ids(4, 12), recipe="llm-pruner", protect=())


def test_signature_is_as_promised() -> None:
    promised = {
        "recipe": None, "ratio": None, "kinds": None, "importance": None, "reduction": None, "ranking": None,
        "protect": None, "round_to": 1, "compensate": None, "tune": None, "tokenizer": None, "seed": 0, "verify": True,
        "inplace": False, "example_inputs": None,
    }  # fmt: skip
    defaults = {name: declared.default for name, (_, declared) in option_table(Options).items()}
    assert promised.items() <= defaults.items()
    assert list(inspect.signature(fxprune.prune).parameters) == ["model", "calibration", "options"]


def test_result_runs_at_any_batch_and_length(result: fxprune.Result) -> None:
    assert isinstance(result.graph_module, GraphModule)
    for batch, tokens in ((1, 1), (1, 7), (5, 3), (2, 33)):
        logits = result(input_ids=token_ids(batch, tokens)).logits
        assert logits.shape == (batch, tokens, VOCABULARY)
        with torch.no_grad():
            assert torch.allclose(logits, result.model(token_ids(batch, tokens)).logits, atol=1e-4)


def test_model_is_bit_identical_and_shares_nothing(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    config = copy.deepcopy(model.config.to_dict())
    slim = fxprune.prune(model, token_ids(4, 12), recipe="llm-pruner", protect=())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert model.config.to_dict() == config
    dense_storage = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert dense_storage.isdisjoint(t.untyped_storage().data_ptr() for _, t in weights(slim.graph_module))
    assert dense_storage.isdisjoint(p.untyped_storage().data_ptr() for p in slim.model.parameters())


def test_inplace_depth_pruning(model: PreTrainedModel) -> None:
    own, select = copy.deepcopy(model), "select-by-group-ratio{group_ratio=0.34}"
    slim = fxprune.prune(own, importance="l2", kinds=("layer",), select=select, protect=(), inplace=True)
    assert slim.model is own and len(own.model.layers) == 2
    assert own.generate(token_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[0] == 2


def test_graph_trains_moves_and_changes_dtype(result: fxprune.Result) -> None:
    slim = copy.deepcopy(result.graph_module).train()
    logits = slim(input_ids=token_ids()).logits
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())
    half = copy.deepcopy(result.graph_module).to(torch.bfloat16)
    assert half(input_ids=token_ids()).logits.dtype == torch.bfloat16
    twin = copy.deepcopy(result.model).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(half(input_ids=token_ids()).logits, twin(token_ids()).logits)
    on_meta = copy.deepcopy(result.graph_module).to("meta")
    assert on_meta(input_ids=token_ids().to("meta")).logits.is_meta


@pytest.mark.slow
def test_graph_compiles(result: fxprune.Result) -> None:
    compiled = torch.compile(copy.deepcopy(result.graph_module), backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 9), (3, 5)):
            want = result(input_ids=token_ids(*shape)).logits
            assert torch.allclose(compiled(input_ids=token_ids(*shape)).logits, want, atol=1e-5)


def test_ungrouped_calibration_forms_agree(result: fxprune.Result) -> None:
    ids = token_ids(4, 12)
    dicts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    padded = [
        {"input_ids": torch.cat([torch.zeros(3, dtype=torch.long), row]), "attention_mask": [0] * 3 + [1] * 12}
        for row in ids
    ]
    loader = torch.utils.data.DataLoader(ids, batch_size=3)
    for data in (dicts, padded, loader):
        assert pruned("llama", data, recipe="llm-pruner", protect=()).plan == result.plan


@pytest.mark.slow
def test_paper_table_for_the_7b_shape() -> None:
    """LLM-Pruner, table 3: parameters and MACs at 64 tokens after 20% and 50%."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    traced = fxprune.trace(model).graph_module
    published = ((0.25, (4, 2), 5.42, 340), (0.6, (3, 1), 3.35, 207))
    for group_ratio, protect, billions, giga in published:
        select = f"select-by-group-ratio{{group_ratio={group_ratio}}}"
        pipeline = fxprune.prune_pipeline(None, importance="random", select=select, protect=protect)
        result = fxprune.Result.of(pipeline(traced).graph_module)
        assert result.report.parameters[0] / 1e9 == pytest.approx(6.74, abs=0.005)
        assert result.report.parameters[1] / 1e9 == pytest.approx(billions, abs=0.005)
        assert result.report.macs[0] / 1e9 == pytest.approx(424, abs=0.5)
        assert result.report.macs[1] / 1e9 == pytest.approx(giga, abs=0.6)
