"""Models for the examples: a tiny random one, or the demo model with ``--demo``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load", "tiny_tokenizer", "wants_demo"]


def wants_demo() -> bool:
    """Return whether the script was called with ``--demo``."""
    return "--demo" in sys.argv[1:]


def load() -> tuple[Any, Any]:
    """Load a language model and its tokenizer: a tiny random one, or the demo model with ``--demo``."""
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
    """Return a tokenizer of single bytes, one pair of letters and three special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters, "th"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
