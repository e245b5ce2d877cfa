"""A tiny random model of every causal language model type that transformers knows, made from its config class alone.

Small numbers go into whichever well-known fields a config class has, lists with one entry a layer are cut to one layer
of each kind, and configs inside configs get the same. What a class demands beyond that is in a table by type. The
sizes differ wherever the class lets them, so that no two axes match by chance.
"""

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import spread

VOCABULARY = 131
LAYERS = 2

_FIELDS: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size "
    "shape_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length original_max_position_embeddings model_max_length",
    104: "dense_intermediate_size intermediate_size_mlp",
    101: "encoder_hash_byte_group_vocab",
    88: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff d_inner "
    "feed_forward_size",
    64: "sliding_window sliding_window_size local_attention attention_window_size index_topk",
    60: "backbone_hidden_size",
    56: "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    48: "hidden_size hidden_size_global d_model n_embd emb_dim dim_model embedding_dim",
    40: "moe_intermediate_size expert_ffn_hidden_size",
    36: "output_embedding_size",
    32: "rel_extent",
    28: "embedding_size input_embedding_size shape_embed_dim",
    26: "q_lora_rank",
    24: "mamba_d_head mamba_head_dim mamba_headdim position_bias_num_buckets",
    22: "kv_lora_rank",
    20: "hidden_size_per_layer_input router_hidden_size hc_lowrank pronunciation_embed_dim",
    18: "index_head_dim linear_value_head_dim",
    16: "chunk_size mamba_chunk_size",
    15: "state_size ssm_state_size mamba_d_state",
    14: "v_head_dim linear_key_head_dim linear_head_dim",
    12: "swa_head_dim",
    10: "head_dim kv_channels attention_head_size qk_nope_head_dim dim_head",
    9: "time_step_rank mamba_dt_rank",
    8: "num_centroids block_multiple_of",
    6: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads qk_rope_head_dim",
    5: "num_experts num_local_experts n_routed_experts moe_num_experts",
    4: "rotary_dim index_n_heads mamba_n_heads mamba_num_heads linear_num_heads linear_num_value_heads "
    "swa_num_attention_heads centroid_intermediate_top_k prompt_types prompt_length segment_types",
    3: "num_key_value_heads num_kv_heads zero_expert_num",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk mamba_n_groups n_groups mamba_ngroups "
    "linear_num_key_heads swa_num_key_value_heads num_codebooks type_vocab_size",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers",
    0: "num_nextn_predict_layers",
}
FIELDS: dict[str, Any] = {name: size for size, names in _FIELDS.items() for name in names.split()}
_DEPTHS = [
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

NO_ATTENTION = frozenset({"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"})
"""Families that have no attention, and so no heads that could go."""

_PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Types whose causal language model is built from a config inside theirs."""

DEMANDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 3, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "o_groups": 2,
        "o_lora_rank": 14,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "diffllama": {"num_key_value_heads": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 48, "adapter_out_dim": 48},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 26,
        "swa_kv_lora_rank": 22,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 18,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 48, "adapter_out_dim": 48, "num_attention_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 96},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
        }
    },
    "gemma4_text": {"global_head_dim": 20},
    "gemma4_unified_text": {"global_head_dim": 20},
    "got_ocr2_vision": {
        "output_channels": 20,
        "mlp_dim": 88,
        "image_size": 64,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kolibri1_1": {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "mlp_only_layers": [0],
        "mlp_only_intermediate_size": 88,
        "index_layers": [1],
        "kv_source_layers": [0, 1],
        "index_num_heads": 1,
        "index_topk": 4,
        "index_pool_size": 4,
        "index_compression": 2,
        "index_num_local_tokens": 1,
        "index_num_sink_tokens": 1,
    },
    "laguna": {"num_attention_heads_per_layer": [6, 9]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 6},
    "mamba2": {"num_heads": 4, "head_dim": 24},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 48,
        "depthwise_separable_out_channel": 48,
        "nemo_conv_channels": 20,
        "bias_max_distance": 16,
    },
    "phi4_multimodal_vision": {"image_size": 56, "crop_size": 56},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 12,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 32], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1, "num_attention_heads": 8, "num_key_value_heads": 4},
}
"""What config classes demand, by model type of the class; a dict for a config inside goes into that config."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What goes into configs.

    Args:
        fields: values by field.
        demands: values by field that a model type demands beyond that.
        lists: entries by field, where a class has a list by default: as many as that has. A number of ``fields``
            becomes all of them. Without, lists are no different from numbers.
    """

    fields: Mapping[str, Any]
    demands: Mapping[str, Mapping[str, Any]]
    lists: Mapping[str, tuple[int, ...]] | None = None


_CAUSAL = Sizes(FIELDS | {"is_decoder": True}, DEMANDS)


def types() -> tuple[str, ...]:
    """Every model type with a causal language model class, in the order of transformers' own table."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@cache
def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of two layers, or of as many as there are kinds of layers.

    Raises:
        Exception: whatever the config class raises.
    """
    return make_config(model_type, {})


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random float32 model in evaluation mode, the same at every call; norm weights and biases are random too.

    Raises:
        Exception: whatever building it raises.
    """
    config = copy.deepcopy(tiny_config(model_type))
    torch.manual_seed(0)
    if model_type in _PARTS:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return spread(model_class._from_config(getattr(config, _PARTS[model_type]), dtype=torch.float32))
    return spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def forward(model: PreTrainedModel, **inputs: torch.Tensor) -> Any:
    """What ``model`` returns for ``inputs``, without a cache where it has a word for that."""
    known = "use_cache" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        return model(**inputs, **({"use_cache": False} if known else {}))


def token_ids(samples: int = 2, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids ``(samples, tokens)``, none of them special."""
    return torch.randint(3, 100, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def make_config(
    model_type: str, more: Mapping[str, Any], config_class: Any = None, sizes: Sizes = _CAUSAL
) -> PreTrainedConfig:
    """The config of a type with the fields that it needs and ``more``."""
    config_class = config_class or CONFIG_MAPPING[model_type]
    wanted = {**sizes.demands.get(model_type, {}), **more}
    default = _default(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    inside = {name: part for name in names if (part := _inside(default, name, wanted.get(name), sizes)) is not None}
    found = _sizes(default, names, sizes) | _layers(default, names, sizes)
    found |= {name: value for name, value in wanted.items() if name not in inside}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:  # latent attention has a key for each query head
        found["num_key_value_heads"] = wanted.get("num_key_value_heads", found["num_attention_heads"])
    config = config_class(**found, **inside)
    rope = getattr(config, "rope_parameters", None) or {}
    if sizes.lists is not None and "rope_theta" in rope and hasattr(config, "num_attention_heads"):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]  # of time, height and width, if any
    return config


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    """The config with nothing said, where its class allows that."""
    try:
        config = config_class()
    except Exception:
        return None
    config.allow_global_per_layer_attribute_access = True
    return config


def _inside(default: PreTrainedConfig | None, name: str, wanted: Any, sizes: Sizes) -> PreTrainedConfig | None:
    """The tiny config that goes into the field ``name``; None where that holds no config."""
    value = getattr(default, name, None)
    if isinstance(wanted, Mapping) and "model_type" in wanted:
        more = {key: entry for key, entry in wanted.items() if key != "model_type"}
        return make_config(wanted["model_type"], more, None, sizes)
    if not isinstance(value, PreTrainedConfig):
        return None
    part = make_config(value.model_type, wanted or {}, type(value), sizes)
    stages = getattr(value, "out_features", None) or []
    if stages and set(stages) <= set(getattr(part, "stage_names", ())) and "out_features" not in (wanted or {}):
        part.out_features = stages  # those of a backbone that are read
    return part


def _sizes(default: PreTrainedConfig | None, names: list[str], sizes: Sizes) -> dict[str, Any]:
    """Sizes and special tokens; the tokens for images and the like are the last of the vocabulary."""
    known = {**sizes.fields, **_TOKENS}
    found = {name: known[name] for name in names if name in known}
    for name in names if sizes.lists is not None else ():
        held = getattr(default, name, None)
        if isinstance(held, list | tuple) and name in sizes.lists:
            found[name] = list(sizes.lists[name][: len(held)])
        elif isinstance(held, list | tuple) and name in found:
            found[name] = [found[name]] * len(held)
    special = [name for name in names if name.endswith(("_token_id", "_token_index")) and name not in _TOKENS]
    given = [name for name in special if isinstance(getattr(default, name, None), int)]
    return found | {name: VOCABULARY - 1 - i for i, name in enumerate(given)}


def _layers(default: PreTrainedConfig | None, names: list[str], sizes: Sizes) -> dict[str, Any]:
    """The number of layers, and the fields with one entry a layer: each distinct entry once or more."""
    depth = next((getattr(default, name) for name in _DEPTHS if isinstance(getattr(default, name, None), int)), None)
    if depth is None or (sizes.lists is not None and "depths" in names):  # stages, each with a depth of its own
        return {}
    kinds: dict[str, list[Any]] = {}
    for name in names:
        value = getattr(default, name, None)
        if (
            name not in sizes.fields
            and isinstance(value, list | tuple)
            and len(value) == depth != len(set(map(repr, value)))
        ):
            kinds[name] = [entry for i, entry in enumerate(value) if entry not in value[:i]]
    layers = max([LAYERS, *map(len, kinds.values())])
    lists = {name: (entries * layers)[:layers] for name, entries in kinds.items()}
    return lists | {name: layers for name in _DEPTHS if name in names}
