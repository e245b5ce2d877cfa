"""Tiny models whose blocks differ in every way, and a tokenizer for them."""

import copy
import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.models import MORE_FAMILIES, VOCABULARY, tiny

HEADS, PAIRS, WIDTHS = (6, 4, 2, 3), (3, 2, 1, 1), (88, 57, 120, 33)
PLAIN = {"hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 6, "num_key_value_heads": 3}


def uneven(family: str, **changes: Any) -> PreTrainedModel:
    """A model of four blocks, each with numbers of heads and a width of its own."""
    model = even(family, num_hidden_layers=len(HEADS), **changes)
    head_dim = getattr(model.config, "head_dim", None) or 8
    for number, (heads, pairs, width) in enumerate(zip(HEADS, PAIRS, WIDTHS, strict=True)):
        config = copy.deepcopy(model.config)
        config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = heads, pairs, width
        config.head_dim = head_dim
        block = model.model.layers[number]
        model.model.layers[number] = fill(type(block)(config, number)).eval()
    return model


def even(family: str, **changes: Any) -> PreTrainedModel:
    sizes = {} if family in MORE_FAMILIES else {**PLAIN, "max_position_embeddings": 256, "num_hidden_layers": 2}
    return fill(tiny(family, **{**sizes, **changes}))


def fill(module: Any) -> Any:
    """Weights that make logits of a few units, and norms that are no ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter) * 0.07
            parameter.copy_(noise + (1 if parameter.dim() == 1 and name.endswith("norm.weight") else 0))
    return module


class Nothing(nn.Module):
    """Stands in for a removed part of a block."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.outputs == 2 else nothing


def without(model: PreTrainedModel, attention: tuple[int, ...] = (), mlp: tuple[int, ...] = ()) -> PreTrainedModel:
    """The model with no attention, or no MLP, in some of its blocks."""
    for number in attention:
        model.model.layers[number].self_attn = Nothing(2)
    for number in mlp:
        model.model.layers[number].mlp = Nothing(1)
    return model


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, those of English text first, one merge, and three special tokens."""
    blank, line_break = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" \n")[0][0]
    rest = [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte not in ("a", "b", blank, line_break)]
    letters = [blank, line_break, *rest]
    tokens = ["<pad>", "<s>", "</s>", "a", "b", "ab", *letters][:VOCABULARY]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
