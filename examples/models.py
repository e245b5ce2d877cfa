"""The models that the examples run on: a tiny random one at once, or the demo model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load", "tiny_tokenizer", "wants_demo"]


def wants_demo() -> bool:
    """Whether the script was called with ``--demo``."""
    return "--demo" in sys.argv[1:]


def load() -> tuple[Any, Any]:
    """A language model and its tokenizer: a random one that knows nothing, or the demo model where it is asked for."""
    if wants_demo():
        from fxprune.cli.demo import demo_checkpoint

        folder = demo_checkpoint()
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=260, bos_token_id=0, eos_token_id=1, **sizes, **heads)
    return LlamaForCausalLM(config).eval(), tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, one for two of them, and three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters, "th"])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **special)
