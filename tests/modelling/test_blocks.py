"""Blocks of individual widths: built, overridden, kept in configs; and a source that stands alone."""

import ast
import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

import fxprune.modelling
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError, block_config, builder_of, names_index
from fxprune.modelling.layerwise import SECTION, Overrides, amend_config, apply_overrides, build_blocks, overrides_in
from fxprune.modelling.table_rows import INPUTS, select_inputs


class Numbered(nn.Module):
    """Is of another kind at index 0, or where there are few layers."""

    def __init__(self, config: Any, layer_idx: int, mode: str = "") -> None:
        super().__init__()
        self.layer_idx, self._block_index, self.heads = layer_idx, layer_idx, layer_idx
        self.inner = nn.Identity() if layer_idx == 0 or config.depth < 3 else nn.Linear(2, 2)


def config(**fields: Any) -> PreTrainedConfig:
    """A config of a few fields."""
    made = PreTrainedConfig()
    vars(made).update(fields)
    return made


def test_names_of_an_index() -> None:
    assert all(map(names_index, ("layer_idx", "idx", "index", "layer_id", "block_id", "layer_number", "layer_num")))
    assert not any(map(names_index, ("pad_token_id", "heads", "num_layers", "depth")))


def test_a_flag_or_a_word_that_a_class_asks_for_is_what_its_block_holds() -> None:
    class Flagged(nn.Module):
        """Wants a flag, and a word by name."""

        def __init__(self, config: Any, layer_idx: int, causal: bool, *, mode: str) -> None:
            super().__init__()
            self.causal, self.mode, self.layer_idx = causal, mode, layer_idx

    build = builder_of(Flagged(None, 0, True, mode="wide"), None)
    assert build is not None
    held = vars(build(config(), 3))
    assert (held["causal"], held["mode"], held["layer_idx"]) == (True, "wide", 3)
    number: Any = 8
    assert builder_of(Flagged(None, 0, number, mode="wide"), None) is None, "it may be a size"

    class Second(nn.Module):
        """Wants a flag in the place of an index."""

        def __init__(self, config: Any, causal: bool) -> None:
            super().__init__()
            self.causal = causal

    again = builder_of(Second(None, False), None)
    assert again is not None and vars(again(config(), 3))["causal"] is False


def test_a_flag_with_a_default_is_read_off_the_modules_inside() -> None:
    """T5's first block has relative positions, which its attention holds; its index is the third argument."""

    class Inner(nn.Module):
        """Holds the flag."""

        def __init__(self, relative: bool) -> None:
            super().__init__()
            self.relative = relative

    class Outer(nn.Module):
        """Passes the flag on."""

        def __init__(self, config: Any, relative: bool = False, layer_idx: int | None = None) -> None:
            super().__init__()
            self.inner, self.other, self.layer_idx = Inner(relative), Inner(False), layer_idx

    again = builder_of(Outer(None, True, 0), None)
    assert again is not None
    block: Any = again(config(), 2)
    assert (block.inner.relative, block.layer_idx) == (True, 2)


def test_a_kind_is_built_where_its_class_builds_it() -> None:
    build = builder_of(Numbered(config(depth=1), 0), {"index": 2, "fields": {"depth": 3}})
    given = config(depth=1)
    assert build is not None
    block = build(given, 0)
    held = vars(block)
    assert isinstance(block.inner, nn.Linear) and given.depth == 1
    assert (held["layer_idx"], held["_block_index"], held["heads"]) == (0, 0, 2)
    assert held[BUILT_AT] == {"index": 2, "fields": {"depth": 3}}
    again = builder_of(block, held[BUILT_AT])
    assert again is not None and isinstance(again(given, 0).inner, nn.Linear)


WHERE = {"class": "Stock", "blocks": "model.layers", "part": ""}
OVERRIDES = Overrides(
    block_fields={"model.layers.1": {"intermediate_size": 24}},
    attributes={"model.norm": {"note": 3}},
    written_afterwards={"pad_token_id": 5},
)


def config_with(section: Any) -> PreTrainedConfig:
    config = AutoConfig.for_model("llama")
    vars(config)[SECTION] = section
    return config


def test_a_section_is_read_with_the_fields_of_its_blocks() -> None:
    place = {"index": 3, "fields": {"num_hidden_layers": 4}}
    own = {"built_at": {"model.layers.2": place}, "written_afterwards": {"n": 1}, "built_with": {"n": 2}}
    found = overrides_in(config_with({**WHERE, "layers": {"0": {}}, **own}))
    assert found == Overrides(block_fields={"model.layers.0": {}}, **own)


@pytest.mark.parametrize("section", [{"layers": []}, {"attributes": 3}, {"layers": {"first": {}}}])
def test_what_is_no_section_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fxprune|first"):
        overrides_in(config_with(section))


@pytest.mark.parametrize(
    ("part", "written", "depth"),
    [("", {"per_layer_config": {"0": {}}}, 2), ("text_config", {"text_config": {"n": 1}}, 2), ("", {}, None)],
)
def test_fields_of_blocks_are_kept_apart_where_stock_code_would_read_them(
    part: str, written: dict[str, Any], depth: int | None, tmp_path: Path
) -> None:
    """HGNet and PVT have lists of depths in place of ``num_hidden_layers``: their configs could not be loaded."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(written))
    amend_config(tmp_path, OVERRIDES, {**WHERE, "part": part}, depth)
    told = json.loads(file.read_text())
    assert told[SECTION]["layers"] == {"1": {"intermediate_size": 24}}
    assert told.get("per_layer_config") == written.get("per_layer_config")


def test_a_block_that_cannot_be_built_is_named() -> None:
    made = nn.Module()
    made.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(CannotBuildError, match=r"blocks\.0"):
        build_blocks(made, lambda _: config(), Overrides(block_fields={"blocks.0": {}}))


def test_attributes_shapes_and_inputs_are_set() -> None:
    made = nn.Module()
    made.norm, made.block = nn.LayerNorm(4), nn.Identity()
    made.norm.register_buffer("table", torch.zeros(4), persistent=False)
    made.norm.weight.requires_grad_(False)
    inputs = {"block": {"x": {"axis": 0, "of": 2, "kept": [1]}}}
    overrides = Overrides(
        attributes={"norm": {"normalized_shape": [3], "eps": 0.1}},
        shapes={"norm.weight": [3]},
        buffers={"norm.table": [5]},
        inputs=inputs,
    )
    apply_overrides(made, overrides)
    assert made.norm.normalized_shape == (3,) and made.norm.eps == 0.1
    assert made.norm.weight.shape == (3,) and not made.norm.weight.requires_grad
    assert made.norm.table.shape == (5,) and "norm.table" in made.state_dict()
    assert vars(made.block)[INPUTS] == inputs["block"]


FOLDER = Path(fxprune.modelling.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_imports_torch_transformers_and_its_like(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            for name in names:
                known = name.startswith("fxprune.modelling.") or name.partition(".")[0] in sys.stdlib_module_names
                assert known or name.partition(".")[0] in ("torch", "transformers"), name


def test_no_name_is_defined_twice() -> None:
    names: list[str] = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [target.id for target in targets if isinstance(target, ast.Name) and target.id != "__all__"]
    assert sorted(names) == sorted(set(names)) and len(names) > 20


class Add(nn.Module):
    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x if bias is None else x + bias


def test_what_is_no_table_goes_in_as_it_is() -> None:
    module = Add()
    select_inputs(module, {"bias": {"axis": 1, "of": 4, "kept": [0]}, "x": {"axis": 3, "of": 2, "kept": [0]}})
    x = torch.ones(2, 3)
    assert torch.equal(module(x), x), "no bias, and an input with fewer axes"
    assert torch.equal(module(x, torch.ones(1, 1)), x + 1), "one row for all"


def test_the_choice_of_kernels_is_the_models_also_for_copies() -> None:
    config = AutoConfig.for_model("llama")
    own = block_config(config, {"intermediate_size": 24})
    config._attn_implementation = "eager"
    assert own._attn_implementation == "eager"
    own._attn_implementation = "sdpa"
    assert own._attn_implementation == config._attn_implementation == "eager"
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(again) is type(own) and again.intermediate_size == 24
        assert again._attn_implementation == "eager"
    assert type(block_config(config, {})) is type(own), "one class for all"
