"""Stock classes that build blocks of their own widths, and what a config says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from fxprune.modelling.layerwise import SECTION, Overrides, amend_config, overrides_in

WHERE = {"class": "Stock", "blocks": "model.layers", "part": ""}
OVERRIDES = Overrides(
    block_fields={"model.layers.1": {"intermediate_size": 24}},
    attributes={"model.norm": {"note": 3}},
    written_afterwards={"pad_token_id": 5},
)


def config_with(section: Any) -> PreTrainedConfig:
    """A config with a section of ours."""
    config = AutoConfig.for_model("llama")
    vars(config)[SECTION] = section
    return config


def test_sections_of_the_first_releases_are_read() -> None:
    place = {"index": 3, "fields": {"num_hidden_layers": 4}}
    earlier = {**WHERE, "layers": {"0": {}}, "places": {"2": place}, "holds": {"n": 1}, "built_with": {"n": 2}}
    assert overrides_in(config_with(earlier)) == Overrides(
        block_fields={"model.layers.0": {}},
        built_at={"model.layers.2": place},
        written_afterwards={"n": 1},
        built_with={"n": 2},
    )


@pytest.mark.parametrize("section", [{"layers": []}, {"attributes": 3}, {"layers": {"first": {}}}])
def test_what_is_no_section_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fxprune|first"):
        overrides_in(config_with(section))


@pytest.mark.parametrize("part", ["", "text_config"])
def test_fields_of_blocks_are_kept_apart_where_stock_code_would_read_them(part: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": {"n": 1}} if part else {"per_layer_config": {"0": {}}}))
    amend_config(tmp_path, OVERRIDES, {**WHERE, "part": part})
    told = json.loads(file.read_text())
    assert told[SECTION]["layers"] == {"1": {"intermediate_size": 24}}
    assert told.get("per_layer_config") == (None if part else {"0": {}})


def test_fields_of_blocks_are_kept_apart_where_the_config_counts_no_layers(tmp_path: Path) -> None:
    """HGNet and PVT have lists of depths in place of ``num_hidden_layers``: their configs could not be loaded."""
    (tmp_path / "config.json").write_text("{}")
    amend_config(tmp_path, OVERRIDES, WHERE, None)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told[SECTION]["layers"] == {"1": {"intermediate_size": 24}} and "per_layer_config" not in told
