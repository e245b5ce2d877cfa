"""Tests: structure of a slim model that its config does not hold, and the modelling file that builds it."""

from __future__ import annotations

import ast
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.checkpoint import structure as modelling_file
from fxprune.checkpoint.structure import Structure, describe, parse_config, pruned_class, stock_class, stock_config
from fxprune.checkpoint.write import save_pretrained
from fxprune.errors import CheckpointError
from fxprune.modelling.layerwise import AnyWidths, Layerwise
from fxprune.modelling.overrides import Overrides
from tests.checkpoint.small import narrow
from tests.emit.small import small
from tests.models import tiny


@pytest.fixture(scope="module")
def slim() -> Any:
    """A model whose second layer is narrower."""
    return narrow()


def test_a_stock_model_needs_no_words() -> None:
    model = tiny("llama")
    structure = describe(model)
    assert structure.is_stock and structure.differences == () and structure.overrides == Overrides()
    assert structure.where == {"class": type(model).__name__, "blocks": "model.layers", "part": ""}


def test_a_block_of_its_own_width_is_told(slim: Any) -> None:
    structure = describe(slim)
    assert structure.overrides == Overrides(block_fields={"model.layers.1": {"intermediate_size": 24}})
    assert structure.differences == ("its blocks differ in width",)


def test_attributes_and_shapes_that_no_field_sets_are_told(slim: Any) -> None:
    model = copy.deepcopy(slim)
    layer = model.model.layers[0]
    layer.mlp.up_proj.out_features = 5
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(5, 48))
    overrides = describe(model).overrides
    assert overrides.attributes == {"model.layers.0.mlp.up_proj": {"out_features": 5}}
    assert overrides.shapes == {"model.layers.0.mlp.up_proj.weight": [5, 48]}


def test_buffers_of_other_values_are_kept() -> None:
    model: Any = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert describe(model).overrides.buffers == {"model.rotary_emb.inv_freq": [4]}
    assert describe(model.to("meta")).is_stock, "values that are not there cannot differ"


def test_a_config_that_its_class_refuses_is_told() -> None:
    model: Any = tiny("llama")
    vars(model.config)["hidden_size"] = 47
    assert "47" in describe_refusal(model)


def describe_refusal(model: Any) -> str:
    """What the config class says."""
    from fxprune.checkpoint.structure import _as_json, _refusal

    return _refusal(type(model.config), _as_json(model.config))


def test_a_module_of_the_user_stops_it(slim: Any) -> None:
    model = copy.deepcopy(slim)
    model.probe = nn.Identity()
    with pytest.raises(CheckpointError, match=r"probe: only the model or what its config builds has it"):
        describe(model)


def test_a_class_that_refuses_its_config_stops_it() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    vars(model.config)["hidden_act"] = "none such"
    with pytest.raises(CheckpointError, match="cannot be built from its config"):
        describe(model)


def test_every_difference_has_words() -> None:
    overrides = Overrides(
        absent={"b": ["n"]}, built_with={"n": 1}, attributes={"": {}}, shapes={"x": [], "y": []}, inputs={"a": {}}
    )
    told = Structure(overrides, {}, "no").differences
    assert told[0] == "its config class refuses these widths: no" and told[1] == "its blocks differ in width"
    assert told[3].endswith("an attribute of: the model") and told[4].endswith("x and 1 more") and len(told) == 6


def test_a_pruned_class_is_like_its_stock_class() -> None:
    model = tiny("llama", num_hidden_layers=1)
    stock, config = type(model), type(model.config)
    pruned = pruned_class(stock, config)
    assert issubclass(pruned, Layerwise) and issubclass(pruned, stock) and pruned.__name__ == stock.__name__
    assert issubclass(pruned.config_class, AnyWidths) and stock_config(pruned.config_class) is config
    assert pruned_class(stock, pruned.config_class).config_class is pruned.config_class
    assert stock_class(model) is stock
    model.__class__ = pruned
    assert stock_class(model) is stock


def test_numbers_that_json_has_not_are_read() -> None:
    data = parse_config('{"a": {"__float__": "Infinity"}, "b": [{"__float__": "NaN"}], "c": {"d": 1}}')
    assert data["a"] == math.inf and math.isnan(data["b"][0]) and data["c"] == {"d": 1}
    with pytest.raises(ValueError):
        parse_config("{")


BUILD = """
import json, sys
sys.modules["fxprune"] = None  # whoever imports it fails
import torch, transformers

config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
told = {"heterogeneous": config.is_heterogeneous, "first": next(iter(config.auto_map)), "head_dim": config.head_dim}
told["layers"] = [layer.intermediate_size for layer in config.per_layer_config]
for name in ("AutoModel", "AutoModel", "AutoModelForCausalLM", "AutoModel"):
    with torch.device("meta"):
        model = getattr(transformers, name).from_config(config, trust_remote_code=True)
    layers = model.base_model.layers
    widths = [layer.mlp.up_proj.out_features for layer in layers]
    told.setdefault(name, []).append([type(model).__name__, widths, [layer.self_attn.layer_idx for layer in layers]])
told["after"] = [layer.intermediate_size for layer in config.per_layer_config]
loaded = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
told["sum"] = sum(float(p.double().sum()) for p in loaded.parameters())
print(json.dumps(told))
"""


def test_the_modelling_file_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = modelling_file._modelling("LlamaForCausalLM", "LlamaConfig", ("LlamaModel", "model"))
    tree = ast.parse(text)
    roots = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    assert "fxprune" not in roots and {"torch", "transformers"} <= roots
    module = ModuleType("modelling")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # transformers looks annotations up there
    space = vars(module)
    exec(compile(tree, "modelling", "exec"), space)
    for name in ("LlamaForCausalLM", "LlamaModel"):
        assert [kind.__name__ for kind in space[name].__mro__[:2]] == [name, "Layerwise"]


def test_an_import_of_several_lines_is_left_out_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from fxprune.a import (\n    b,\n    c,\n)\nimport os\n")
    module = type(modelling_file)("module")
    module.__file__ = str(path)
    assert modelling_file._standing_alone(module).split() == ["import", "os"]


def test_nothing_is_written_for_a_class_of_the_user(tmp_path: Path) -> None:
    assert modelling_file.write_modelling(small(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """What a process without this package finds in the folder of a model whose second layer is narrower."""
    folder = tmp_path_factory.mktemp("checkpoints") / "slim"
    model = narrow()
    save_pretrained(model, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-W", "ignore", "-c", BUILD, str(folder)]
    found = json.loads(subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout)
    found["wanted"] = sum(float(p.double().sum()) for p in model.base_model.parameters())
    return lambda: found


def test_each_model_that_is_built_from_one_config_has_the_right_widths(told: Callable[[], Any]) -> None:
    """Engines build a model to look at and throw away, then one around which they put their own head."""
    found = told()
    assert found["AutoModel"] == [["LlamaModel", [88, 24, 88], [0, 1, 2]]] * 3
    assert found["AutoModelForCausalLM"] == [["LlamaForCausalLM", [88, 24, 88], [0, 1, 2]]]
    assert found["sum"] == pytest.approx(found["wanted"], rel=1e-6)


def test_the_config_says_what_engines_read_from_it(told: Callable[[], Any]) -> None:
    found = told()
    assert found["heterogeneous"] and found["layers"] == found["after"] == [88, 24, 88]
    assert found["first"] == "AutoConfig" and found["head_dim"] == 8
