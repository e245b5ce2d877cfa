"""Models loaded by folder: what is refused, and that no code of a folder is run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxprune
from fxprune.checkpoint.low_memory import request_key
from fxprune.checkpoint.read import load_model, load_tokenizer
from fxprune.errors import CheckpointError, UnsupportedModelError
from tests.models import tiny, token_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_weights_of_blocks_that_the_config_lacks_are_refused(folder: Path) -> None:
    edit(folder, num_hidden_layers=tiny("llama").config.num_hidden_layers - 1)
    with pytest.raises(CheckpointError, match=r"more are of a block that its config does not have.*number of layers"):
        load_model(folder)


def test_code_in_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on a terminal, and a "y" on standard input ran it."""
    (folder / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_model, load_tokenizer, fxprune.prune):
        with pytest.raises(CheckpointError):
            load(folder)
    with pytest.raises(CheckpointError):
        fxprune.prune_checkpoint(folder, folder.parent / "slim", importance="l2")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Words", null]}}')
    save = fxprune.load_pass("save-checkpoint", folder=str(folder.parent / "saved"), tokenizer=str(folder))
    steps = ["find-groups", "l2", "select-by-ratio", "shrink", "emit-model", "make-report", save]
    with pytest.raises(CheckpointError):
        fxprune.Pipeline(steps)(fxprune.trace(tiny("llama")).graph_module)


def test_a_run_resumes_only_for_the_same_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(2, 8)
    key = request_key(folder, ids, "l2")
    assert key == request_key(folder, ids.clone(), "l2")
    others = [request_key(folder, ids.view(1, 16), "l2"), request_key(folder, ids.int(), "l2")]
    others += [request_key(folder, ids, "l1"), request_key(folder, None, "l2")]
    monkeypatch.setattr("fxprune.checkpoint.low_memory.package_versions", lambda: {"fxprune": "9"})
    others.append(request_key(folder, ids, "l2"))
    monkeypatch.undo()
    before = (folder / "config.json").stat()
    edit(folder, rms_norm_eps=1e-3)
    os.utime(folder / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(request_key(folder, ids, "l2"))
    assert key not in others and len(set(others)) == len(others)


def test_a_slim_model_in_another_dtype_has_whole_frequencies_of_positions(tmp_path: Path) -> None:
    """They were rounded to bfloat16, so that a slim model was measured worse than it is beside the dense one."""
    fxprune.save_pretrained(tiny("llama", num_hidden_layers=1), tmp_path / "slim")
    model = load_model(tmp_path / "slim", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_classifier_comes_back_in_its_own_auto_class(tmp_path: Path) -> None:
    config = tiny("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    model = transformers.LlamaForSequenceClassification(config).eval()
    result = fxprune.prune(model, importance="l2", kinds="mlp", ratio=0.2)
    result.save_pretrained(tmp_path / "slim")
    saved = json.loads((tmp_path / "slim/config.json").read_text())
    assert "AutoModelForSequenceClassification" in saved["auto_map"] and "AutoModelForCausalLM" not in saved["auto_map"]
    read: Any = transformers.AutoModelForSequenceClassification.from_pretrained
    loaded = read(tmp_path / "slim", trust_remote_code=True)
    ids = token_ids(2, 8)
    assert (loaded(ids).logits - result.model(ids).logits).abs().max() < 1e-6
    assert "AutoModelForSequenceClassification" in (tmp_path / "slim/README.md").read_text()


def test_adapters_are_merged_first() -> None:
    import peft

    base = tiny("llama", num_hidden_layers=1)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    plan = fxprune.Plan({}, ())
    doors: list[Callable[[], object]] = [
        lambda: fxprune.trace(model, {"foo": 3}),
        lambda: fxprune.trace(base),  # which PEFT changed
        lambda: fxprune.trace(nn.Sequential(model)),
        lambda: fxprune.prune(model, "text", importance="l2"),
        lambda: fxprune.prune(model, offload="work"),
        lambda: fxprune.prune_checkpoint(model, "slim"),
        lambda: fxprune.apply(model, plan, compensate="least-squares"),
        lambda: fxprune.recover(model, [], None, learning_rate=-1),
        lambda: fxprune.save_pretrained(model, "slim"),
        lambda: fxprune.export_model(model, "slim.gguf"),
    ]
    for door in doors:
        with pytest.raises(UnsupportedModelError, match=r"Call merge_and_unload\(\) first"):
            door()


def test_offloading_is_an_option_of_a_prune(folder: Path) -> None:
    """The weights stay in files, the result is the same, and nothing is left beside the folder."""
    options: dict[str, Any] = {"importance": "l2", "compensate": "none", "tune": "none", "ratio": 0.2}
    inside = fxprune.prune(folder, **options)
    outside = fxprune.prune(folder, offload=folder.parent / "work", **options)
    assert outside.plan.to_json() == inside.plan.to_json()
    ids = token_ids(2, 8)
    assert torch.equal(outside.model(ids).logits, inside.model(ids).logits)
    assert [path.name for path in folder.parent.iterdir()] == ["dense"]
