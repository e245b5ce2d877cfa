"""The file with which transformers builds a slim model where this package is not installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxprune.checkpoint import structure as modelling_file
from fxprune.checkpoint.write import save_pretrained
from tests.checkpoint.small import narrow
from tests.emit.small import small

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
