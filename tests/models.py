"""Tiny random models of the families the tests run on: odd, distinct sizes, so that no two match by chance."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 131

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}

FAMILIES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "llama": _LLAMA_LIKE,
        "qwen3": {**_LLAMA_LIKE, "head_dim": 10},
        "phi3": {**_LLAMA_LIKE, "original_max_position_embeddings": 256},
        "gemma3_text": {**_LLAMA_LIKE, "head_dim": 10, "sliding_window": 64},
        "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 88, "n_positions": 256},
        "gpt_neox": {
            "hidden_size": 48,
            "intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 4},
        "falcon": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 88},
    }
)
"""The families that every test about families runs on."""

_SMALL = {**_LLAMA_LIKE, "num_hidden_layers": 2}
_GPT2_LIKE = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 88, "n_positions": 256}
_EXPERTS = {**_SMALL, "num_experts_per_tok": 2}

MORE_FAMILIES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "mistral": {**_SMALL, "sliding_window": 64},
        "qwen2": _SMALL,
        "gemma": {**_SMALL, "head_dim": 10},
        "gemma2": {**_SMALL, "head_dim": 10, "sliding_window": 64, "query_pre_attn_scalar": 14},
        "phi": _SMALL,
        "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
        "opt": {
            "hidden_size": 48,
            "ffn_dim": 88,
            "word_embed_proj_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        "starcoder2": {**_SMALL, "sliding_window": 64},
        "olmo2": _SMALL,
        "cohere2": {**_SMALL, "sliding_window": 64, "logit_scale": 0.7},
        "glm4": {**_SMALL, "head_dim": 12},
        "granite": {**_SMALL, "residual_multiplier": 0.6, "attention_multiplier": 0.3},
        "smollm3": {**_SMALL, "no_rope_layers": [1, 0]},
        "mixtral": {**_EXPERTS, "num_local_experts": 5},
        "qwen2_moe": {
            **_EXPERTS,
            "num_experts": 5,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [0],
        },
        "stablelm": _SMALL,
        "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256},
        "gpt_bigcode": _GPT2_LIKE,
    }
)
"""Further families, with two layers each, for the tests on emitted models."""


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A random model of a family in evaluation mode, the same at every call; ``changes`` say all of other families."""
    torch.manual_seed(0)
    sizes = FAMILIES.get(family) or MORE_FAMILIES.get(family, {})
    config = AutoConfig.for_model(family, **{**_COMMON, **sizes, **changes})
    return spread(AutoModelForCausalLM.from_config(config))


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in evaluation mode, with values far enough from zero and one that a wrong removal shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * 0.2
            parameter.copy_(noise + 1 if parameter.dim() == 1 and bool((parameter == 1).all()) else noise)
    return model.eval()


def all_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all of their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def token_ids(samples: int = 2, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids ``(samples, tokens)``."""
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))
