"""The modelling file that builds a slim model without this package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fxprune.checkpoint import write as modelling_file
from fxprune.checkpoint.write import save_pretrained
from tests.checkpoint.small import narrow
from tests.emit.small import small

BUILD = """
import json, sys
sys.modules["fxprune"] = None  # whoever imports it fails
import torch, transformers

config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
found = {"heterogeneous": config.is_heterogeneous, "first": next(iter(config.auto_map)), "head_dim": config.head_dim}
found["layers"] = [layer.intermediate_size for layer in config.per_layer_config]
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModel"):
    with torch.device("meta"):
        model = getattr(transformers, name).from_config(config, trust_remote_code=True)
    layers = model.base_model.layers
    widths = [layer.mlp.up_proj.out_features for layer in layers]
    found.setdefault(name, []).append([type(model).__name__, widths, [layer.self_attn.layer_idx for layer in layers]])
found["after"] = [layer.intermediate_size for layer in config.per_layer_config]
loaded = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
found["sum"] = sum(float(p.double().sum()) for p in loaded.parameters())
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
found["text"] = model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False).tolist()
print(json.dumps(found))
"""


def test_the_modelling_file_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = modelling_file._modelling("LlamaForCausalLM", "LlamaConfig", "LlamaModel")
    assert not re.search(r"^\s*(from|import) fxprune\b", text, re.M)
    module = ModuleType("modelling")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # transformers looks annotations up there
    space = vars(module)
    exec(compile(text, "modelling", "exec"), space)
    for name in ("LlamaForCausalLM", "LlamaModel"):
        assert [kind.__name__ for kind in space[name].__mro__[:2]] == [name, "Layerwise"]


def test_imports_are_left_out_as_a_whole_and_classes_of_the_user_have_no_file(tmp_path: Path) -> None:
    assert modelling_file.write_modelling(small(), tmp_path) == {} and list(tmp_path.iterdir()) == []
    path = tmp_path / "module.py"
    path.write_text("from fxprune.a import (\n    b,\n    c,\n)\nimport os\n")
    module = type(modelling_file)("module")
    module.__file__ = str(path)
    assert modelling_file._without_own_imports(module).split() == ["import", "os"]


@pytest.mark.slow
def test_serving_engines_find_the_right_widths_without_this_package(tmp_path: Path) -> None:
    """Engines build a model to look at and throw away, then one around which they put their own head."""
    folder, model = tmp_path / "slim", narrow()
    save_pretrained(model, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-W", "ignore", "-c", BUILD, str(folder)]
    found = json.loads(subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout)
    assert found["AutoModel"] == [["LlamaModel", [88, 24, 88], [0, 1, 2]]] * 2
    assert found["AutoModelForCausalLM"] == [["LlamaForCausalLM", [88, 24, 88], [0, 1, 2]]]
    assert found["sum"] == pytest.approx(sum(float(p.double().sum()) for p in model.base_model.parameters()), rel=1e-6)
    want = model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False).tolist()
    assert found["text"] == want, "the same text"
    assert found["heterogeneous"] and found["layers"] == found["after"] == [88, 24, 88]
    assert found["first"] == "AutoConfig" and found["head_dim"] == 8
