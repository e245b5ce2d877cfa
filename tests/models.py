"""Tiny random models of the families the tests run on: odd, distinct sizes, so that no two match by chance."""

from __future__ import annotations

import torch
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

FAMILIES: dict[str, dict[str, object]] = {
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


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A random model of ``family`` in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_spread(parameter))
    return model


def _spread(parameter: torch.Tensor) -> torch.Tensor:
    """Values far enough from zero and one that a wrong removal shows in the logits."""
    noise = torch.randn(parameter.shape)
    return noise * 0.2 + (1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0)


def token_ids(samples: int = 2, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids ``(samples, tokens)``."""
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))
