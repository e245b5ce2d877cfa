"""The zoo holds what it says, and what the coverage table says of a diverse part of it holds at every run."""

import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fxprune.pipeline.pipeline import Pipeline
from fxprune.trace import trace
from tests.coverage_page import KINDS, has_any, has_exact, page
from tests.coverage_table import rows_of
from tests.coverage_types import Coverage, emission, examine, told, use
from tests.oracle import groups_of
from tests.tiers import SLOW, tiers
from tests.zoo import NO_ATTENTION, VOCABULARY, forward, tiny_config, tiny_model, token_ids, types

DIVERSE = (
    *(
        "biogpt",
        "blenderbot",
        "cohere",
        "ctrl",
        "data2vec-text",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "gpt_neo",
        "glm",
    ),
    *("lfm2", "llama4_text", "mamba", "minicpm3", "olmo2", "persimmon", "qwen3", "smollm3", "xglm", "xlnet"),
)
"""Types that trace fast."""
ROOT = Path(__file__).parents[2]


def recorded(name: str) -> dict[str, Any]:
    """What a run over all types left."""
    data: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return data


@pytest.mark.slow
def test_every_type_has_a_config_or_a_reason() -> None:
    failing = {}
    for model_type in types():
        try:
            config = tiny_config(model_type)
        except Exception as error:
            failing[model_type] = told(error)
            continue
        assert isinstance(config, CONFIG_MAPPING[model_type])
    assert len(types()) > 150
    assert failing == {}


def test_tiny_models_are_of_distinct_sizes_and_the_same_at_every_call() -> None:
    config: Any = tiny_config("llama")
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads]
    sizes += [config.num_key_value_heads, config.head_dim, config.num_attention_heads * config.head_dim]
    assert len(set(sizes)) == len(sizes) and config.vocab_size == VOCABULARY
    assert [tiny_config(name).num_hidden_layers for name in ("llama", "nemotron_h", "lfm3")] == [2, 4, 3]
    first, second = tiny_model("llama"), tiny_model("llama")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training and first.get_parameter("model.norm.weight").std() > 0.05


@pytest.mark.parametrize(
    "model_type", tiers(["musicgen", "zamba", "dbrx", "dots3_note_text", "reformer", "qwen4_exp_text"], "dbrx")
)
def test_types_with_demands_of_their_own_run(model_type: str) -> None:
    logits = forward(tiny_model(model_type), input_ids=token_ids()).logits
    assert logits.shape[-1] == VOCABULARY
    assert logits.isfinite().all()


@pytest.mark.parametrize("model_type", tiers(DIVERSE, "mamba"))
def test_what_is_found_goes_exactly(model_type: str) -> None:
    found = dataclasses.asdict(examine(model_type, emit=False))
    assert found["stage"] == "done", found["error"]
    (row,) = (row for row in recorded("coverage")["rows"] if row["type"] == model_type)
    assert [kind for kind in KINDS if has_exact(found, kind)] == [kind for kind in KINDS if has_exact(row, kind)]
    assert [group for group in found["groups"] if group["removal"] not in ("exact", "inert", "nothing can go")] == []
    assert model_type in NO_ATTENTION or has_any(found, "head")


@pytest.mark.parametrize(
    "model_type",
    tiers(["llama", "axk2", "bamba", "gemma4_unified_text", "got_ocr2", "laguna", "moshi", "xlnet", "zamba"]),
)
def test_a_slim_model_is_stored_loaded_and_run(model_type: str) -> None:
    """Also one whose config has an infinite number, or a width for a kind of layer, or a second stack of layers.

    And one whose class cannot fill modules of new widths with initial values, which transformers' loader asks of it.
    And one with heads under a norm over a group of them, which has the group's size as a number of its own. And many
    kinds at once, numbers of heads in a list with an entry a layer, and layers whose class asks for a flag. And one
    with parameters that only its generation reads.
    """
    found = examine(model_type)
    assert (found.stage, found.error) == ("done", "")
    assert found.emitted == found.reloaded == found.generated == {"mlp+head": "yes"}


@pytest.mark.parametrize("within", tiers([1, 2]))
def test_heads_go_where_their_width_is_no_multiple_of_the_models(within: int) -> None:
    """Their norm knows how many units it is taken over, which no tensor tells; no field gives such a width."""
    config = copy.deepcopy(tiny_config("bamba"))
    vars(config).update(mamba_n_heads=8, mamba_d_head=12, mamba_n_groups=within)
    torch.manual_seed(0)
    traced = trace(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    Pipeline("find-groups{norm=masked}")(traced.graph_module)
    found = groups_of(traced.graph_module)
    heads = [group for group in found if group.kind == "head" and group.size == 8 // within]
    result, verdict = emission(traced, heads)
    assert verdict == "yes" and result is not None
    assert use(result, traced) == ("yes", "yes")


@SLOW
def test_what_the_stock_class_cannot_do_is_told_of_the_dense_model() -> None:
    """Its loader zeroes the padding row of the embedding, which here is not zero."""
    found = examine("youtu")
    assert found.emitted == {"mlp+head": "yes"}
    assert found.reloaded["mlp+head"].startswith("nor does the dense model: differs")


def test_a_type_that_cannot_be_built_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model_type: str) -> None:
        raise ImportError(f"{model_type} needs a library\nand more words")

    monkeypatch.setattr("tests.coverage_types.tiny_model", fail)
    found = examine("llama")
    assert found.stage == "build"
    assert found.error.startswith("ImportError: llama needs a library (tests/end_to_end/test_zoo.py:")


def _look(name: str, keep: Callable[[Coverage], None]) -> Coverage:
    """A stand-in for `examine` that ends its process in one of several ways."""
    found = Coverage(name, stage="remove")
    if name == "crash":
        os._exit(3)
    if name == "hang":
        keep(found)
        start = time.process_time()
        while time.process_time() - start < 30:
            pass
    found.stage = "done"
    return found


def test_a_crash_or_a_hang_costs_one_type_alone() -> None:
    rows = {row["type"]: row for row in rows_of(["crash", "hang", "llama"], workers=2, seconds=1, look=_look)}
    assert rows["crash"]["error"] == "the process ended with 3"
    assert (rows["hang"]["stage"], rows["hang"]["error"]) == ("remove", "not done after 1 s")
    assert (rows["llama"]["stage"], rows["llama"]["error"]) == ("done", "")


@pytest.mark.parametrize("name", tiers(["AutoModelForSeq2SeqLM/t5", "AutoModelForImageClassification/swinv2"]))
def test_a_type_of_another_class_is_emitted_and_loaded_by_it(name: str) -> None:
    """A decoder's blocks were built as an encoder's; a vision model's blocks are in stages that no config builds."""
    found = examine(name)
    assert (found.stage, found.error, found.whole) == ("done", "", {})
    assert found.emitted == found.reloaded == {"mlp+head": "yes"}


def test_the_page_is_the_one_made_from_the_data() -> None:
    made = page(recorded("coverage"), recorded("coverage_classes"))
    assert (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8") == made
