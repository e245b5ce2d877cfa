"""Tiny random models of transformers that are no causal language models: encoders, encoder-decoders, images, sound."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

Inputs = dict[str, torch.Tensor]
Example = tuple[nn.Module, Inputs]


def image(side: int, channels: int = 3) -> Inputs:
    """Two random images."""
    return {"pixel_values": torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2))}


def sound(*sizes: int, seed: int) -> torch.Tensor:
    return torch.randn(2, *sizes, generator=torch.Generator().manual_seed(seed))


_IDS = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))
_TEXT, _DECODED = {"input_ids": _IDS}, {"decoder_input_ids": _IDS[:, :4]}
_SEEN = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 26}
_READ = {"vocab_size": 31, **_SEEN}
_PLACES = {"max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    **{"vocab_size": 31, "d_model": 20, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 26},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 22, **_SPECIAL},
}
_T5 = {"vocab_size": 31, "d_model": 20, "d_kv": 5, "d_ff": 26, "num_layers": 1, "num_heads": 4}
_WHISPER = {"num_mel_bins": 7, "max_source_positions": 6, "max_target_positions": 64, "decoder_start_token_id": 1}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
_SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 2}
_STAGES = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 1]}
_CONVNEXT = {"hidden_sizes": [6, 10], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2}
_WAV2VEC2 = {
    **{"conv_dim": (6, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3)},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
_PATCHES = {"image_size": 8, "patch_size": 4}
_CLIP = {
    "text_config": {**_READ, **_PLACES, "eos_token_id": 2},
    "vision_config": {**_SEEN, **_PATCHES, "hidden_size": 16, "intermediate_size": 22},
    "projection_dim": 14,
}

_MODELS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "t5": ("T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, _TEXT | _DECODED),
    "bart": ("BartForConditionalGeneration", {**_BART, **_PLACES}, _TEXT | _DECODED),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BART, **_WHISPER},
        {"input_features": sound(7, 12, seed=3), **_DECODED},
    ),
    "bert": ("BertForMaskedLM", {**_READ, **_PLACES}, _TEXT),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**_READ, **_SPECIAL, **_PLACES, "cls_token_id": 1, "sep_token_id": 2},
        _TEXT,
    ),
    "deberta": ("DebertaV2ForMaskedLM", {**_READ, **_RELATIVE, **_PLACES, "max_relative_positions": 8}, _TEXT),
    "albert": ("AlbertForMaskedLM", {**_READ, **_PLACES, "num_hidden_layers": 2, "embedding_size": 9}, _TEXT),
    "vit": ("ViTForImageClassification", {**_SEEN, **_PATCHES}, image(8)),
    "swin": ("SwinForImageClassification", _SWIN, image(8)),
    "convnext": ("ConvNextForImageClassification", _CONVNEXT, image(16)),
    "resnet": ("ResNetForImageClassification", {**_STAGES, "layer_type": "basic"}, image(16)),
    "regnet": ("RegNetForImageClassification", {**_STAGES, "groups_width": 4}, image(16)),
    "wav2vec2": ("Wav2Vec2ForCTC", {**_READ, **_WAV2VEC2}, {"input_values": sound(50, seed=4)}),
    "clip": ("CLIPModel", _CLIP, _TEXT | image(8)),
}
"""The class of each, its config and the inputs of its forward."""


def _made(name: str) -> Example:
    kind, sizes, inputs = _MODELS[name]
    model = getattr(transformers, kind)
    return model(model.config_class(**sizes)), {**inputs}


LIBRARY: dict[str, Callable[[], Example]] = {name: partial(_made, name) for name in _MODELS}


def stirred(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, with weights and statistics that make a wrong removal show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if "running_var" in name:
                value.uniform_(0.5, 2)
            elif isinstance(value, nn.Parameter) or "running_mean" in name:
                unit = value.dim() == 1 and bool((value == 1).all())
                value.copy_(torch.randn(value.shape) * 0.3 + float(unit))
    return module.eval()
