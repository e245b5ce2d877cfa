"""Configs of single blocks that follow the model's."""

from __future__ import annotations

import copy
import pickle

from transformers import AutoConfig

from fxprune.modelling.blocks import block_config


def test_the_choice_of_kernels_is_the_models() -> None:
    config = AutoConfig.for_model("llama")
    own = block_config(config, {})
    config._attn_implementation = "eager"
    assert own._attn_implementation == "eager"
    own._attn_implementation = "sdpa"
    assert own._attn_implementation == config._attn_implementation == "eager"


def test_copies_of_it_still_follow() -> None:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = "eager"
    own = block_config(config, {"intermediate_size": 24})
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(again) is type(own) and again.intermediate_size == 24
        assert again._attn_implementation == "eager"
    assert type(block_config(config, {})) is type(own), "one class for all"
