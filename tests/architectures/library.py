"""Tiny random models of transformers that are no causal language models: encoders, encoder-decoders, images, sound."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

Example = tuple[nn.Module, dict[str, torch.Tensor]]

_IDS = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))
_TEXT = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 26}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    **{"vocab_size": 31, "d_model": 20, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 26},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 22, **_SPECIAL},
}


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


def image(side: int, channels: int = 3) -> dict[str, torch.Tensor]:
    """Two random images."""
    return {"pixel_values": torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2))}


def _text(model: Callable[[Any], nn.Module], config: Any) -> Example:
    return model(config), {"input_ids": _IDS}


def _pair(model: Callable[[Any], nn.Module], config: Any, **source: torch.Tensor) -> Example:
    return model(config), {**(source or {"input_ids": _IDS}), "decoder_input_ids": _IDS[:, :4]}


def t5() -> Example:
    sizes = {"vocab_size": 31, "d_model": 20, "d_kv": 5, "d_ff": 26, "num_layers": 1, "num_heads": 4}
    return _pair(hf.T5ForConditionalGeneration, hf.T5Config(**sizes, decoder_start_token_id=0))


def bart() -> Example:
    return _pair(hf.BartForConditionalGeneration, hf.BartConfig(**_BART, max_position_embeddings=64))


def whisper() -> Example:
    sizes = {"num_mel_bins": 7, "max_source_positions": 6, "max_target_positions": 64, "decoder_start_token_id": 1}
    sound = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(3))
    return _pair(hf.WhisperForConditionalGeneration, hf.WhisperConfig(**_BART, **sizes), input_features=sound)


def bert() -> Example:
    return _text(hf.BertForMaskedLM, hf.BertConfig(**_TEXT, max_position_embeddings=64))


def modernbert() -> Example:
    config = hf.ModernBertConfig(**_TEXT, **_SPECIAL, max_position_embeddings=64, cls_token_id=1, sep_token_id=2)
    return _text(hf.ModernBertForMaskedLM, config)


def deberta() -> Example:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    config = hf.DebertaV2Config(**_TEXT, **relative, max_relative_positions=8, max_position_embeddings=64)
    return _text(hf.DebertaV2ForMaskedLM, config)


def albert() -> Example:
    sizes = {**_TEXT, "num_hidden_layers": 2, "embedding_size": 9, "max_position_embeddings": 64}
    return _text(hf.AlbertForMaskedLM, hf.AlbertConfig(**sizes))


def vit() -> Example:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 26}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4)), image(8)


def swin() -> Example:
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 2}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes)), image(8)


def convnext() -> Example:
    config = hf.ConvNextConfig(hidden_sizes=[6, 10], depths=[1, 1], num_stages=2, image_size=16, patch_size=2)
    return hf.ConvNextForImageClassification(config), image(16)


def resnet() -> Example:
    config = hf.ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return hf.ResNetForImageClassification(config), image(16)


def regnet() -> Example:
    config = hf.RegNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], groups_width=4)
    return hf.RegNetForImageClassification(config), image(16)


def wav2vec2() -> Example:
    convolutions = {"conv_dim": (6, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3)}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sound = torch.randn(2, 50, generator=torch.Generator().manual_seed(4))
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_TEXT, **convolutions, **places)), {"input_values": sound}


def clip() -> Example:
    seen = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 22}
    read = {**_TEXT, "max_position_embeddings": 64, "eos_token_id": 2}
    config = hf.CLIPConfig(
        text_config=read, vision_config={**seen, "image_size": 8, "patch_size": 4}, projection_dim=14
    )
    return hf.CLIPModel(config), {"input_ids": _IDS, **image(8)}


LIBRARY: dict[str, Callable[[], Example]] = {
    make.__name__: make
    for make in (
        t5, bart, whisper, bert, modernbert, deberta, albert, vit, swin, convnext, resnet, regnet, wav2vec2, clip
    )
}  # fmt: skip
