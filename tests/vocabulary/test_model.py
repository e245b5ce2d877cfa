"""Models with fewer rows compute what they did for the tokens that stay, and are stock models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from fxprune.emit.structure import describe_structure
from fxprune.errors import PlanError, UnsupportedModelError
from fxprune.vocabulary.model import find_rows, ids_in_settings, trimmed_model
from tests.models import VOCABULARY, tiny

KEPT = (0, 1, 2, *range(5, 94, 2), 111, 130)
_WIDTHS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 111}
_BART = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
_BERT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 56}


def _other(auto: Any, family: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(family, **_WIDTHS, **sizes)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


MODELS: dict[str, Any] = {
    "llama": lambda: tiny("llama", num_hidden_layers=1),
    "llama tied": lambda: tiny("llama", num_hidden_layers=1, tie_word_embeddings=True),
    "gpt2": lambda: tiny("gpt2", n_layer=1),
    "gemma3_text": lambda: tiny("gemma3_text", num_hidden_layers=1),
    "gptj": lambda: tiny("gptj", n_layer=1),
    "opt": lambda: tiny("opt", num_hidden_layers=1),
    "t5": lambda: _other(
        AutoModelForSeq2SeqLM, "t5", d_model=48, d_kv=12, num_heads=4, d_ff=56, num_layers=1, decoder_start_token_id=0
    ),
    "bart": lambda: _other(AutoModelForSeq2SeqLM, "bart", **_BART, decoder_start_token_id=2, bos_token_id=1),
    "bert": lambda: _other(AutoModelForMaskedLM, "bert", **_BERT),
}
"""Embeddings tied to heads and apart, heads with biases, and biases of logits."""


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_kept_tokens_are_those_of_the_model(name: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    slim = trimmed_model(model, KEPT)
    ids = torch.randint(len(KEPT), (2, 11), generator=torch.Generator().manual_seed(3))
    kept = torch.tensor(KEPT)
    torch.testing.assert_close(_logits(slim, ids), _logits(model, kept[ids])[..., kept], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert slim.config.vocab_size == len(KEPT) and type(slim) is type(model)
    assert describe_structure(slim).is_stock
    assert slim.config.eos_token_id == KEPT.index(model.config.eos_token_id)
    ours, theirs = ({id(tensor) for tensor in one.parameters()} for one in (slim, model))
    assert not ours & theirs and len(ours) == len(theirs)


def test_other_tensors_may_be_shared() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.n_hooks = 3  # a number of such a name was taken for a table of hooks
    slim = trimmed_model(model, KEPT, share=True)
    shared = [name for name, one in slim.named_parameters() if one is model.get_parameter(name)]
    assert {name for name, _ in slim.named_parameters()} - {*shared} == {*find_rows(model).axes}


def test_generation_uses_the_new_ids() -> None:
    model: Any = tiny("llama", num_hidden_layers=1, eos_token_id=[2, 111])
    model.generation_config.suppress_tokens = [5, 7]
    assert ids_in_settings(model) == {0, 1, 2, 5, 7, 111}
    slim: Any = trimmed_model(model, KEPT)
    assert slim.generation_config.eos_token_id == [2, KEPT.index(111)]
    assert slim.generation_config.suppress_tokens == [3, 4]
    assert slim.generate(torch.tensor([[1, 4]]), max_new_tokens=3).max() < len(KEPT)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(PlanError, match="tokens 0 to 131 stay, the model has 0 to 130"):
        trimmed_model(tiny("llama", num_hidden_layers=1), (0, 131))


def test_a_model_whose_width_is_the_number_of_tokens_is_refused() -> None:
    """A matrix with two such axes would be cut along the wrong one."""
    with pytest.raises(UnsupportedModelError, match="2 of its axes are as long as the vocabulary"):
        trimmed_model(tiny("llama", num_hidden_layers=1, vocab_size=48), (0, 1, 2))


@pytest.mark.parametrize(
    ("family", "size", "name"),
    [
        ("llama", "intermediate_size", "model.layers.0.mlp.up_proj.weight"),
        ("gpt2", "n_positions", "transformer.wpe.weight"),
    ],
)
def test_another_axis_as_long_as_the_vocabulary_stays(family: str, size: str, name: str) -> None:
    """Positions were cut without an error, since a short text has only the first of them."""
    model = tiny(family, **{size: VOCABULARY})
    slim = trimmed_model(model, KEPT)
    assert slim.get_parameter(name).shape == model.get_parameter(name).shape
    assert find_rows(slim).size == len(KEPT) and describe_structure(slim).is_stock
