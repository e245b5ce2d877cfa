"""Remove whole experts of a mixture, those that contribute least to the tokens routed to them.

The demo model is not a mixture: this model is random, and its text is meaningless.
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import fxprune
from examples.models import tiny_tokenizer


def main() -> None:
    """Prune a quarter of the experts, and generate with the slim model."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model, tokenizer = MixtralForCausalLM(config).eval(), tiny_tokenizer()
    text = "A mixture sends each token to a few of its experts. " * 40
    samples = tokenizer(text, return_tensors="pt").input_ids[0, : 16 * 64].view(16, 64)
    result = fxprune.prune(
        model,
        samples,
        recipe="llm-pruner",
        importance="reap",
        select="select-by-group-ratio{group_ratio=0.25}",
        kinds="expert",
        protect=(),
    )
    for name, (before, after) in result.report.widths.items():
        print(f"{name}: {before} to {after}")
    slim = result.model
    print(f"{type(slim).__name__} with {slim.config.num_local_experts} experts, two for each token")
    ids = tokenizer("A mixture", return_tensors="pt").input_ids
    print(f"it generates {slim.generate(ids, max_new_tokens=8, do_sample=False).shape[1] - ids.shape[1]} tokens")


if __name__ == "__main__":
    main()
