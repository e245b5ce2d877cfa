"""Tiny random models of every type of every Auto class of transformers, with inputs that they run on.

Configs are made as those of causal language models are, with further sizes for images and sounds. Inputs are the ones
that a class's ``forward`` names; where a text must hold a token for each feature of an image, the model says how many.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fxprune.trace.inputs import forward_parameters
from tests.models import spread
from tests.zoo import DEMANDS, FIELDS, VOCABULARY, Sizes, forward, make_config

SAMPLES, TOKENS, DECODED, SIDE = 2, 7, 5, 32

_MORE: dict[Any, str] = {
    64: "num_patches",
    SIDE: "image_size crop_size pretrain_image_size img_size",
    4: "patch_size num_frames frames_per_clip num_conv_pos_embeddings stride query_size",
    3: "num_labels num_channels in_chans num_input_channels",
    2: "depth window_size num_conv_pos_embedding_groups squeeze_factor temporal_patch_size tubelet_size groups_width "
    "num_groups num_codevectors_per_group spatial_merge_size scale_factor top_k_experts",
    9: "num_queries relative_attention_max_distance",
    8: "relative_attention_num_buckets",
    10: "d_kv input_feat_per_channel feature_projection_input_dim",
    12: "max_source_positions codevector_dim proj_codevector_dim classifier_proj_size num_buckets",
    16: "num_mel_bins embed_dim hidden_dim decoder_hidden_size fusion_hidden_size head_hidden_size "
    "reassemble_hidden_size bottleneck_features bin_embedding_dim auxiliary_channels feature_size "
    "mask_feature_size aspp_out_channels encoder_hidden_dim stem_out_channels subsampling_conv_channels "
    "output_channels decoder_dim reduce_dim xvector_output_dim num_pos_feats",
    48: "out_hidden_size d_model hidden_size projection_dim pred_hidden_size backbone_hidden_size text_hidden_size "
    "audio_hidden_size projection_hidden_size vision_hidden_size cross_hidden_size",
    88: "d_ff encoder_feedforward_dim dim_feedforward mlp_dim decoder_intermediate_size intermediate_size "
    "prompt_mid_dim",
    6: "decoder_num_attention_heads num_cross_attention_heads num_self_attention_heads pred_num_attention_heads "
    "d_heads",
    1: "num_latents_blocks num_pooler_layers",
}
_LISTS: dict[str, tuple[int, ...]] = {
    "hidden_sizes": (16, 24, 32, 40, 48, 56),
    "embed_dims": (16, 24, 32, 40),
    "neck_hidden_sizes": (12, 16, 20, 24, 28, 32, 36),
    "num_attention_heads": (2, 2, 4, 4),
    "num_heads": (2, 2, 4, 4),
    "depths": (1,) * 8,
    "depth": (1,) * 8,
    "conv_dim": (10, 12),
    "conv_stride": (3, 2),
    "conv_kernel": (5, 3),
    "downsample_channels": (40, 48),
    "tdnn_dim": (14, 18, 22, 26, 30),
    "num_attractors": (4, 2, 2, 1),
}
"""Entries, of which a field gets as many as it has; those of convolutions over sounds are two."""

_WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
_FED_TWICE = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
_TILES = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}

_DEMANDS: dict[str, dict[str, Any]] = {
    "beit": {"patch_size": 8, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"patch_size": 8, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [2, 2, 4], "depth": [1, 2, 3]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "donut-swin": {"patch_size": 2},
    "convbert": {"num_attention_heads": 6, "head_ratio": 2},
    "dinat": {"embed_dim": 16},
    "efficientnet": {
        **{"width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 4, "kernel_sizes": [3, 3, 5]},
        **{"in_channels": [32, 12, 16], "out_channels": [12, 16, 20], "strides": [1, 2, 2], "hidden_dim": 1280},
        **{"num_block_repeats": [1, 1, 1], "expand_ratios": [1, 2, 2], "depthwise_padding": []},
    },
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "n_head": 6, "block_repeats": None, "num_decoder_layers": 1},
    "hgnet_v2": {
        **{"stem_channels": [3, 8, 12], "stage_in_channels": [12, 16, 20, 24], "stage_mid_channels": [8, 10, 12, 14]},
        **{
            "hidden_sizes": [16, 20, 24, 28],
            "stage_out_channels": [16, 20, 24, 28],
            "stage_num_blocks": [1] * 4,
            "stage_numb_of_layers": [1] * 4,
        },
    },
    "hiera": {"patch_size": [7, 7]},
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [4, 4, 4],
        **{"stride": 2, "patch_size": 16},
        "image_size": 128,
        "down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]],
    },
    "mobilebert": {"true_hidden_size": 24, "intra_bottleneck_size": 24, "embedding_size": 48},
    "mobilenet_v1": {"depth_multiplier": 0.25, "min_depth": 4},
    "mobilenet_v2": {"depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4},
    "mobilevit": {"hidden_sizes": [24, 32, 40], "num_attention_heads": 4, "patch_size": 2, "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 2, "image_size": 64},
    "perceiver": {
        **{"num_latents": 8, "d_latents": 48, "num_self_attends_per_block": 1, "num_cross_attention_heads": 4},
        **{"num_self_attention_heads": 4, "image_size": 32},
    },
    **{name: {"mm_tokens_per_image": 16} for name in ("gemma3", "t5gemma2_encoder")},
    "shieldgemma2": {"mm_tokens_per_image": 16, "yes_token_index": 5, "no_token_index": 6},
    **{f"pix2struct_{name}_model": {"d_kv": 8, "patch_embed_hidden_size": 48} for name in ("text", "vision")},
    **{name: {"relative_attention_num_buckets": 32} for name in ("mpnet", "udop")},
    **{"t5": {"decoder_start_token_id": 1}, "vipllava": {"vision_feature_layer": [-2, -1]}},
    "pvt_v2": {"image_size": SIDE},
    "qwen2_vl": {"vision_config": {"embed_dim": 48}},
    **dict.fromkeys(("qwen2_5_vl_vision", "exaone4_5_vision", "qwen2_5_omni_vision_encoder"), _WINDOWS),
    **dict.fromkeys(("qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_omni_moe_vision_encoder"), _FED_TWICE),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILES),
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    **{name: {"image_token_index": VOCABULARY - 1} for name in ("instructblip", "instructblipvideo")},
    "idefics2": {"perceiver_config": {"resampler_n_heads": 6, "resampler_head_dim": 8, "num_key_value_heads": 3}},
    **{name: {"embed_dim": 48} for name in ("idefics_vision", "kosmos_2_text_model", "kosmos_2_5_text_model")},
    "hunyuan_vl_vision": {"temporal_patch_size": 1},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 16, "head_dim": 8},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "llama4_vision_model": {
        **{"intermediate_size": 192, "projector_input_dim": 40, "projector_output_dim": 40, "vision_output_dim": 40}
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8, "input_size": SIDE},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 144},
    "sam_vision_model": {"global_attn_indexes": [1], "window_size": 2},
    "kosmos-2": {"latent_query_num": 4},
    "granite4_vision": {
        **{"downsample_rate": "1/2", "vision_config": {"hidden_size": 128, "num_attention_heads": 8}, **_TILES},
        **{"deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 0, 1, 1]},
    },
    "chmv2": {
        "backbone_config": {
            **{"model_type": "dinov3_vit", "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
            **{"return_class_token": True, "reshape_hidden_states": True},
        }
    },
    "align": {"projection_dim": 320, "vision_config": {"width_coefficient": 1.0, "depth_coefficient": 1.0}},
    "vitmatte": {
        **{"fusion_hidden_sizes": [32, 24, 20, 16], "convstream_hidden_sizes": [12, 16, 20]},
        "backbone_config": {"patch_size": 16},
    },
    "vitpose_backbone": {"patch_size": [8, 8], "part_features": 16, "num_experts": 1},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0], "scaled_images_ratios": [1, 1, 1]},
    "blip-2": {"image_token_index": VOCABULARY - 1},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4},
    "oneformer": {"conv_dim": 32, "mask_dim": 32, "hidden_dim": 32, "num_attention_heads": 4},
    "regnet": {"groups_width": 8},
    "sew": {"squeeze_factor": 2},
    "squeezebert": {"embedding_size": 48} | {f"{name}_groups": 2 for name in ("q", "k", "v", "output", "intermediate")},
    "swin": {"patch_size": 2},
    "swinv2": {"patch_size": 2},
    "swin2sr": {"embed_dim": 24, "num_heads": [3], "depths": [2], "patch_size": 1, "upscale": 2},
    "textnet": {"stem_out_channels": 12, "hidden_sizes": [12, 12, 16, 20, 24], "image_size": [64, 64]},
    "xlm": {"n_heads": 6},
    **{"vivit": {"tubelet_size": [2, 8, 8]}, "videoprism_vision_model": {"tubelet_size": [1, 4, 4]}},
    **{name: {"num_key_value_heads": 6, "head_dim": 8} for name in ("esmc", "granite_speech5_encoder")},
    **{"ernie4_5_vl_moe_text": {"num_attention_heads": 4, "num_key_value_heads": 2}, "neomme": {"head_dim": 16}},
    "chameleon": {
        **{"image_token_id": VOCABULARY - 1, "vq_config": {"num_embeddings": 8, "base_channels": 32}},
        "vocabulary_map": {"<image>": VOCABULARY - 1} | {f"IMGIMG{digit}Z": i for i, digit in enumerate("ABCDEFGH")},
    },
    "emu3": {
        "image_token_id": VOCABULARY - 1,
        "vq_config": {"codebook_size": 8, "base_channels": 32, "hidden_size": 128, "num_attention_heads": 8},
        "vocabulary_map": {"<image>": VOCABULARY - 1, "<|extra_200|>": VOCABULARY - 2}
        | {f"<|visual token {i:06}|>": i for i in range(8)},
    },
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 1, 1]}},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
    **{name: {"out_hidden_size": 192} for name in ("muse_glimmer", "muse_spark")},
    **{"glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 4}, "dia": {"delay_pattern": [0, 1, 2]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}, "image_patch_id": VOCABULARY - 1},
    "nemotron_h_omni": {"image_token_id": VOCABULARY - 1, "vision_config": {"video_temporal_patch_size": 2}},
    "pp_formulanet_vision": {"post_conv_in_channels": 16, "decoder_hidden_size": 48},
    "pp_ocrv6_small_det": {
        "layer_list_out_channels": [96, 96, 192, 384],
        "backbone_config": {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
    },
    "lw_detr_vit": {"num_windows": 4, "window_block_indices": [0], "out_features": ["stage1", "stage2"]},
    "lw_detr": {"projector_scale_factors": [1.0], "d_model": 64, "decoder_self_attention_heads": 4},
    **{"fun_asr_nano": {"adaptor_config": {"intermediate_size": 12}}, "mimi": {"upsample_groups": 48}},
    **{f"moonshine{name}": {"conv_stride": [8, 10], "num_key_value_heads": 6} for name in ("", "_streaming")},
    "sapiens2": {"num_key_value_heads_per_layer": [3, 6]},
    "sapiens2_head": {"upsample_out_channels": [24, 20], "conv_out_channels": [16]},
    **{"molmo2_vision": {"num_position_embeddings": 16}, "instructblipvideo": {"video_token_index": VOCABULARY - 1}},
    "wavtokenizer_encoder": {"codebook_dim": 48, "decoder_attention_num_groups": 4},
    "apertus1p5": {
        **{"image_token_offset": 8, "audio_token_offset": 16, "audio_config": {"codebook_size": 8}},
        "vision_config": {"codebook_size": 8, "base_channels": 32},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
}


_FOUR = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_ABOUT_DEPTH = {"backbone_config": {"model_type": "dinov2", **_FOUR}, "reassemble_hidden_size": 48}
_STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4}
_RESNET = {"model_type": "resnet", "out_features": [f"stage{i}" for i in range(1, 5)]}
_WIDTHS = {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
_LEVELS = {"model_type": "rt_detr_resnet", **_STAGES, "out_features": ["stage2", "stage3", "stage4"]}
_REAL_TIME = {
    **{**_WIDTHS, "encoder_hidden_dim": 64, "encoder_in_channels": [24, 32, 40], "decoder_in_channels": [64] * 3},
    **{"backbone_config": _LEVELS, "feat_strides": [8, 16, 32], "decoder_n_points": 2},
}
for _name in ("detr", "conditional_detr", "table-transformer", "dab-detr"):
    _DEMANDS[_name] = {**_WIDTHS, "backbone_config": _RESNET}
_DEMANDS |= {
    **{"depth_anything": _ABOUT_DEPTH, "prompt_depth_anything": _ABOUT_DEPTH, "upernet": {"backbone_config": _RESNET}},
    "zoedepth": {"backbone_config": {"model_type": "beit", "patch_size": 8, **_FOUR}},
    "tipsv2_dpt": {"backbone_config": {**_FOUR, "apply_layernorm": True}},
    **{"rt_detr": _REAL_TIME, "rt_detr_v2": _REAL_TIME},
}

_STRIPES = {
    f"{way}_{size}ratio": [side, 1, side // 2]
    for way in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
    for size, side in (("long", 7), ("mid", 5), ("short", 3))
}
for _name in ("pp_ocrv5_server_det", "pp_ocrv6_medium_det"):
    _DEMANDS[_name] = {
        **{"scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2], "neck_out_channels": 64},
        "backbone_config": {"out_features": _RESNET["out_features"]},
        "intraclass_block_config": {**_STRIPES, "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]},
    }
_STAGED = {name: value for name, value in _REAL_TIME.items() if name != "backbone_config"}
for _name in ("d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"):
    _DEMANDS[_name] = _STAGED | {"encoder_in_channels": [20, 24, 28]}
_DEMANDS["pp_doclayout_v2"] |= {"class_thresholds": [0.5] * 3, "class_order": [0, 1, 2]}
_DEMANDS["pp_doclayout_v3"] |= {"x4_feat_dim": 16}

_SIZES = Sizes(
    FIELDS | {name: size for size, names in _MORE.items() for name in names.split()}, DEMANDS | _DEMANDS, _LISTS
)


def auto_classes() -> dict[str, tuple[str, ...]]:
    """The model types of each Auto class but that for causal language models, by the name of the class."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if isinstance(auto, type) and isinstance(mapping, dict) and name != "AutoModelForCausalLM":
            found[name] = tuple(mapping)
    return found


def tiny_model_of(auto_class: str, model_type: str) -> PreTrainedModel:
    """A random float32 model in evaluation mode, of the class that ``auto_class`` has for the type.

    Raises:
        Exception: whatever building it raises.
    """
    config = make_config(model_type, {}, sizes=_SIZES)
    auto: Any = getattr(transformers, auto_class)
    several = auto._model_mapping[type(config)]
    if isinstance(several, tuple):  # the class is told by its name
        config.architectures = [several[0].__name__]
    torch.manual_seed(0)
    return spread(auto.from_config(config, dtype=torch.float32))


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random inputs that ``model`` runs on: its main input, what ``forward`` demands, and others until it runs.

    Raises:
        Exception: whatever the model raises on the last of them.
    """
    named = forward_parameters(model)
    demanded = [name for name, one in named.items() if one.default is one.empty and name in _MAKERS]
    decodes = ["decoder_input_ids"] if model.config.is_encoder_decoder and not _ends(model) else []
    seen = _OF_IMAGES if "input_ids" in named else []  # a text is about an image
    seen = [*seen, "image_sizes"] if _stated(model.config, "image_grid_pinpoints") is not None else [*seen]
    seen += ["aspect_ratio_ids", "aspect_ratio_mask", "image_position_ids", "visual_feats", "visual_pos"]
    seen += ["noise", "timestep"]
    seen += ["pixel_attention_mask", "spatial_shapes"] if "spatial_shapes" in named else []  # patches in rows
    seen += ["qformer_input_ids", "image_attention_mask", "image_embeds_position_mask"]
    main = model.main_input_name  # a name, or several
    wanted = [*([main] if isinstance(main, str) else main), *demanded, *decodes, *seen]
    wanted += ["input_ids"] if model.can_generate() else []
    names = dict.fromkeys(name for name in wanted if name in named)
    others = [name for name in _MAKERS if name in named and name not in names]
    errors = []
    added = [*(others[:count] for count in range(len(others) + 1)), *([name] for name in others[1:])]
    for more in added:
        found = {name: value for name in [*names, *more] if (value := _made(model, name)) is not None}
        try:
            return _runnable(model, found)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _runnable(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``inputs`` that ``model`` runs on, with a token for each feature of an image in the text."""
    token = next((token for name in _IMAGE_TOKENS if (token := _stated(model.config, name)) is not None), None)
    counts: list[int] = []
    if not _is_about_text(_failure(model, inputs)):
        forms = _other_forms(model, inputs)
        inputs = inputs | next((one for one in forms if _is_about_text(_failure(model, inputs | one))), {})
    while True:
        ids, given = inputs.get("input_ids"), inputs
        if ids is not None and token is not None and counts:
            marked = torch.full((len(ids), counts.pop(0)), token)
            given = inputs | {"input_ids": torch.cat([ids[:, :2], marked, ids[:, 2:]], dim=1)}
            given |= {"attention_mask": torch.ones_like(given["input_ids"])} if "attention_mask" in inputs else {}
            named = "mm_token_type_ids"
            if "image_grid_thw" in inputs and (named in forward_parameters(model) or named in _failure(model, given)):
                given["mm_token_type_ids"] = (given["input_ids"] == token).long()
        try:
            forward(model, **given)
            return given
        except Exception as error:
            features = _FEATURES.search(str(error))
            if given is inputs and features is not None:  # counted as vectors, or as numbers
                found = int(features[features.lastindex or 0]) // SAMPLES
                counts = [found, found // model.config.get_text_config().hidden_size]
            if not counts or token is None or ids is None:
                raise


_FEATURES = re.compile(r"features:? \(?(\d+)|Got (\d+) (?:image|feature)")
_WIDTH = re.compile(r"\(\d+x\d+ and (\d+)x|normalized_shape=\[(\d+)\]")
"""How models tell the number of vectors that they have for images, and the width that they want."""


def _other_forms(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The images and sounds of ``inputs`` in other forms: one of several, in patches, transposed, as wide as wanted."""
    wide = _WIDTH.search(_failure(model, inputs))
    width = int(wide[wide.lastindex or 0]) if wide else None
    if images := {name: inputs[name] for name in ("pixel_values", "high_res_pixel_values") if name in inputs}:
        yield {name: image.unsqueeze(1) for name, image in images.items()}
        yield from ({"pixel_values": _in_patches(model.config, form, width)} for form in (1, 2, 3, 4))
        yield {name: image[:, 0] for name, image in images.items()}
    for name, sound in inputs.items():
        if name in ("input_values", "input_features"):
            yield from ({name: one} for one in (sound.unsqueeze(1), sound.mT, sound.repeat(1, 1, 4)))


def _in_patches(config: Any, form: int, width: int | None) -> torch.Tensor:
    """Images as patches of a width: a row for each sample (1), or rows of all (3); as small images of all (2), or with
    any frames before and channels behind (4)."""
    side, channels = _stated(config, "patch_size") or 4, _stated(config, "num_channels", "in_chans") or 3
    width = width or channels * side * side
    shapes = {1: (SAMPLES, 16, width), 2: (SAMPLES * 16, channels, side, side), 3: (SAMPLES * 16, width)}
    frames, wide = _stated(config, "temporal_patch_size"), side * (_stated(config, "spatial_merge_size") or 1)
    shapes[4] = (SAMPLES * 16, *((frames,) if frames else ()), wide, wide, channels)
    return torch.randn(shapes[form], generator=torch.Generator().manual_seed(form))


def _is_about_text(failure: str) -> bool:
    """Whether a model read its images: it runs, or misses tokens for them in the text."""
    return not failure or _FEATURES.search(failure) is not None


def _ends(model: PreTrainedModel) -> bool:
    """Whether a decoder is to classify a text by the token that ends it, which it then makes its own input of."""
    return model.config.is_encoder_decoder and type(model).__name__.endswith("ForSequenceClassification")


def _failure(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> str:
    try:
        forward(model, **inputs)
    except Exception as error:
        return str(error)
    return ""


_OF_IMAGES = ["pixel_values", "high_res_pixel_values", "image_grid_thw", "image_grid_hw", "image_grids"]
_OF_IMAGES += ["image_merge_sizes", "image_token_pooling"]
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "video_token_index")
_IMAGE_TOKENS += ("image_patch_id",)


def _stated(config: PreTrainedConfig, *fields: str) -> Any:
    """The first value that a config or a part of it has for one of ``fields``."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    found = (getattr(part, field, None) for field in fields for part in parts)
    return next((value for value in found if value is not None), None)


def _made(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    made = _MAKERS[name](model.config) if name in _MAKERS else None
    if made is None or isinstance(made, torch.Tensor):
        return made
    draw = torch.Generator().manual_seed(len(name))
    if name not in _WHOLE:
        return torch.randn(made, generator=draw)
    whole = torch.randint(*_WHOLE[name], made, generator=draw)
    if name == "input_ids" and _ends(model):
        whole[:, -1] = model.config.eos_token_id
    return whole


def _side(config: Any) -> tuple[int, int]:
    side = _stated(config, "image_size", "crop_size") or SIDE
    return tuple(side) if isinstance(side, list | tuple) else (side, side)


def _pixels(config: Any) -> tuple[int, ...]:
    channels = _stated(config, "num_channels", "in_chans") or 3
    patch = _stated(config, "temporal_patch_size") or (_stated(config, "temporal_merge_size") and 1)
    if patch is not None and _stated(config, "spatial_merge_size") is not None:  # rows of patches, and a grid
        side = _stated(config, "patch_size")
        return (SAMPLES * 16, channels * patch * side * side)
    if _stated(config, "num_patches") is not None and _stated(config, "image_size") is None:
        return (SAMPLES, _stated(config, "num_patches"), channels * _stated(config, "patch_size") ** 2)
    frames = _stated(config, "num_frames", "frames_per_clip")
    if _stated(config, "max_num_tiles") is not None:
        return (SAMPLES, 1, _stated(config, "max_num_tiles"), channels, *_side(config))
    if _stated(config, "image_grid_pinpoints") is not None:  # the image in tiles, and all of it
        return (SAMPLES, 3, channels, *_side(config))
    return (SAMPLES, *((frames,) if frames else ()), channels, *_side(config))


def _sound(config: Any) -> tuple[int, ...]:
    bins = _stated(config, "num_mel_bins")
    if _stated(config, "max_length") and bins and _stated(config, "conv_stride") is None:
        return (SAMPLES, _stated(config, "max_length"), bins)
    return (SAMPLES, 24 * math.prod(_stated(config, "conv_stride") or (8,)))


def _features(config: Any) -> tuple[int, ...]:
    width = _stated(config, "feature_projection_input_dim", "input_feat_per_channel")
    positions = _stated(config, "max_source_positions")
    if width is None and positions is not None:
        return (SAMPLES, _stated(config, "num_mel_bins"), 2 * positions)
    frames = TOKENS * (_stated(config, "audio_length_per_tok") or 0) or 24
    return (SAMPLES, frames, width or _stated(config, "num_mel_bins") or 10)


def _patch_mask(config: Any) -> torch.Tensor:
    count = _stated(config, "num_patches") or 1  # or of images
    return torch.ones((SAMPLES, count), dtype=torch.long if count > 1 else torch.bool)


def _flattened_patches(config: Any) -> torch.Tensor:
    shape = (SAMPLES, 16, 2 + config.vision_config.patch_embed_hidden_size)
    return 4 * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


_MAKERS: Mapping[str, Callable[[Any], tuple[int, ...] | torch.Tensor]] = {
    "input_ids": lambda config: (
        *(SAMPLES, TOKENS),
        *([config.num_codebooks + 1] if _stated(config, "codebook_vocab_size") else []),
    ),
    "pixel_values": _pixels,
    "input_values": _sound,
    "input_features": _features,
    "decoder_input_ids": lambda config: (SAMPLES, DECODED, *map(len, filter(None, [_stated(config, "delay_pattern")]))),
    "qformer_input_ids": lambda _: (SAMPLES, DECODED),
    "image_grid_thw": lambda _: torch.tensor([[1, 4, 4]] * SAMPLES),
    "image_token_pooling": lambda _: (SAMPLES * 4, 4),
    "image_grids": lambda _: torch.tensor([[2, 2, 0, 0]] * SAMPLES),
    "image_grid_hw": lambda _: torch.full((SAMPLES, 2), 4),
    "image_merge_sizes": lambda _: torch.full((SAMPLES,), 2),
    "flattened_patches": _flattened_patches,
    "state": lambda config: (SAMPLES, config.max_state_dim),
    "noise": lambda config: (SAMPLES, config.chunk_size, config.max_action_dim),
    "timestep": lambda _: (SAMPLES,),
    "pixel_values_videos": lambda config: (SAMPLES, _stated(config, "frames_per_clip") or 4, 3, *_side(config)),
    "pixel_attention_mask": _patch_mask,
    "image_attention_mask": lambda _: _ones(SAMPLES, TOKENS, 1),
    "image_embeds_position_mask": lambda _: (torch.arange(TOKENS) < 4).expand(SAMPLES, TOKENS),
    "task_inputs": lambda config: (SAMPLES, _stated(config, "task_seq_len")),
    "spatial_shapes": lambda _: torch.full((SAMPLES, 2), 8),
    "bbox": lambda _: (SAMPLES, TOKENS, 4),
    "attention_mask": lambda _: _ones(SAMPLES, TOKENS),
    "image_sizes": lambda _: torch.full((SAMPLES, 2), SIDE),
    "high_res_pixel_values": lambda config: (SAMPLES, 3, *_side(config.high_res_vision_config)),
    "aspect_ratio_ids": lambda _: _ones(SAMPLES, 1),
    "aspect_ratio_mask": lambda config: _ones(SAMPLES, 1, _stated(config, "max_num_tiles")),
    "image_position_ids": lambda _: (torch.arange(16)[:, None] // torch.tensor([1, 4]) % 4).expand(SAMPLES, 16, 2),
    "visual_feats": lambda config: (SAMPLES, 9, config.visual_feat_dim),
    "visual_pos": lambda _: (SAMPLES, 9, 4),
    "past_values": lambda _: (SAMPLES, 32),
    "global_attention_mask": lambda _: (torch.arange(TOKENS) < 2).long().expand(SAMPLES, TOKENS),
    "decoder_input_values": lambda config: (SAMPLES, DECODED, _stated(config, "num_mel_bins")),
}
"""Inputs, the likeliest first: the shapes of those that are random, and the others themselves."""

_WHOLE = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "task_inputs"), (3, 100)),
    **{"bbox": (0, 2), "image_token_pooling": (0, 16)},
}
"""Random integers, with their lowest value and the end of their range."""
