"""Checkpoints from end to end, and what is refused or run when one is loaded."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fxprune
from fxprune.checkpoint.low_memory import request_key
from fxprune.checkpoint.read import load_model, load_tokenizer
from fxprune.errors import CheckpointError, FxpruneError, RatioError, UnsupportedModelError
from tests.checkpoint.conftest import UNEVEN
from tests.checkpoint.small import edit, narrow
from tests.emitted import greedy, logits
from tests.export.small import tokenizer
from tests.models import tiny, token_ids
from tests.remembered import pruned
from tests.tokens import character_tokenizer

torch.set_num_threads(1)


EVEN = {**UNEVEN, "uniform": True, "ranking": "local", "protect": None}


def test_a_config_with_an_infinite_number_is_saved(tmp_path: Path) -> None:
    """transformers writes infinity as an object that says so."""
    model = narrow()
    model.config.time_step_limit = [0.0, float("inf")]
    fxprune.save_pretrained(model, tmp_path / "slim")
    back = fxprune.from_pretrained(tmp_path / "slim")
    assert list(back.config.time_step_limit) == [0.0, float("inf")]
    assert torch.equal(logits(back), logits(model))


def test_a_loaded_model_is_saved_the_same_again(uneven: fxprune.Result, folder: Path, tmp_path: Path) -> None:
    model = pickle.loads(pickle.dumps(fxprune.from_pretrained(folder)))  # whose class has no name that a module knows
    first = fxprune.save_pretrained(uneven.model, tmp_path / "a")
    assert first == fxprune.save_pretrained(model, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_its_config_can_be_read_by_anyone(folder: Path) -> None:
    """A tokenizer is looked up by the config, which a stock class refused to read."""
    assert transformers.AutoConfig.from_pretrained(folder).intermediate_size == 88
    with pytest.raises(RuntimeError, match=r"[Ss]ize mismatch|ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "kinds"), [("gpt2", ("mlp",)), ("llama", ("mlp", "channel", "layer")), ("llama", ("mlp", "head"))]
)
def test_a_uniform_model_is_a_stock_checkpoint(family: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    result = pruned(family, **{**EVEN, "kinds": kinds, "ratio": 0.2})
    structure = result.save_pretrained(tmp_path / "slim")
    assert structure.is_stock and not list((tmp_path / "slim").glob("*.py"))
    assert "auto_map" not in (tmp_path / "slim" / "config.json").read_text()
    assert abs(result.report.achieved - 0.2) < 0.02
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(stock), logits(result.model))
    assert torch.equal(greedy(stock), greedy(result.model))


@pytest.mark.slow
def test_uniform_takes_the_same_fraction_or_refuses_what_makes_layers_differ() -> None:
    result = pruned("llama", **{**EVEN, "ratio": None, "select": "select-by-group-ratio{group_ratio=0.25}"})
    assert set(result.report.widths.values()) == {(88, 66)}
    with pytest.raises(RatioError, match="same widths in all layers"):
        pruned("bloom", changes={"n_layer": 2}, **EVEN)
    for option in ({"protect": (1, 0)}, {"ranking": "global"}):
        with pytest.raises(FxpruneError, match="uniform"):
            pruned("llama", **{**EVEN, **option})


def test_a_checkpoint_is_as_large_as_its_parameters(uneven: fxprune.Result, folder: Path) -> None:
    parameters = sum(p.numel() for p in uneven.model.parameters())
    held = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == parameters
    assert not [name for name in held if "grad" in name or "optim" in name]
    dense = sum(p.numel() for p in tiny("llama").parameters())
    assert parameters / dense == pytest.approx(1 - uneven.report.achieved, abs=1e-9)
    names = {"README.md", "config.json", "fxprune.json", "generation_config.json", "model.safetensors"}
    names |= {"modeling_fxprune.py", "plan.json", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == names
    manifest = json.loads((folder / "fxprune.json").read_text())
    assert manifest.keys() == {
        *("source", "stock", "weights", "files", "versions", "format", "plan_digest", "forward", "digest"),
    }
    assert manifest["versions"].keys() >= {"fxprune", "torch", "transformers"}
    assert manifest["source"] == {**manifest["source"], "parameters": dense, "class": type(uneven.model).__name__}
    assert fxprune.Plan.from_json((folder / "plan.json").read_text()) == uneven.plan
    assert fxprune.Report.from_dict(json.loads((folder / "report.json").read_text())) == uneven.report
    (folder / "other").write_text("")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {modes["other"]}


def test_large_models_are_sharded(uneven: fxprune.Result, tmp_path: Path) -> None:
    uneven.save_pretrained(tmp_path / "slim", max_shard_size="100KB")
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 2
    assert (tmp_path / "slim" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(fxprune.from_pretrained(tmp_path / "slim")), logits(uneven.model))


def test_saving_draws_nothing(uneven: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of a layer solves the axes of the graph again and runs Graphviz."""
    monkeypatch.setattr("fxprune.result.layer_svg", lambda *_: "<svg>a layer</svg>")
    uneven.save_pretrained(tmp_path / "slim")
    assert "<svg>a layer</svg>" not in (tmp_path / "slim/report.html").read_text()
    assert "<svg>a layer</svg>" in uneven.write_report(tmp_path / "page.html").read_text()


def test_the_tokenizer_and_generation_config_come_along(uneven: fxprune.Result, tmp_path: Path) -> None:
    model = copy.deepcopy(uneven.model)
    model.generation_config.max_new_tokens = 7
    fxprune.save_pretrained(model, tmp_path / "slim", tokenizer())
    assert fxprune.from_pretrained(tmp_path / "slim").generation_config.max_new_tokens == 7
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "slim").convert_tokens_to_ids("b") == 4


def test_loading_takes_the_options_of_transformers(folder: Path) -> None:
    model = fxprune.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not any(p.is_meta for p in model.parameters())


CONFIG = "config.json"
CHANGED, FOREIGN = "content was changed", "does not belong"
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "plan missing": (lambda f: (f / "plan.json").unlink(), "plan.json", "missing"),
    "config edited": (lambda f: edit(f / CONFIG, lambda d: d["per_layer_config"].clear()), CONFIG, CHANGED),
    "stray adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json", FOREIGN),
    "stray code": (lambda f: (f / "modeling_other.py").write_text(""), "modeling_other.py", FOREIGN),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(damage: str, folder: Path) -> None:
    harm, file, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        fxprune.from_pretrained(folder)
    assert file in str(caught.value)


def test_a_model_with_adapters_is_not_taken_for_a_slim_one(uneven: fxprune.Result, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(uneven.model), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(CheckpointError, match="merge adapters first"):
        fxprune.save_pretrained(adapted.base_model.model, tmp_path / "slim")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_weights_of_blocks_that_the_config_lacks_are_refused(dense: Path) -> None:
    edit(dense / CONFIG, lambda data: data.update(num_hidden_layers=data["num_hidden_layers"] - 1))
    with pytest.raises(CheckpointError, match=r"more are of a block that its config does not have.*number of layers"):
        load_model(dense)


def test_code_in_a_folder_is_never_run(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on a terminal, and a "y" on standard input ran it."""
    (dense / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(dense / CONFIG, lambda data: data.update(model_type="own", auto_map=code))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_model, load_tokenizer, fxprune.prune):
        with pytest.raises(CheckpointError):
            load(dense)
    with pytest.raises(CheckpointError):
        fxprune.prune_checkpoint(dense, dense.parent / "slim", importance="l2")
    (dense / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Words", null]}}')
    save = fxprune.load_pass("save-checkpoint", folder=str(dense.parent / "saved"), tokenizer=str(dense))
    steps = ["find-groups", "l2", "select-by-ratio", "shrink", "emit-model", "make-report", save]
    with pytest.raises(CheckpointError):
        fxprune.Pipeline(steps)(fxprune.trace(tiny("llama")).graph_module)


def test_a_run_resumes_only_for_the_same_question(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(2, 8)
    key = request_key(dense, ids, "l2")
    assert key == request_key(dense, ids.clone(), "l2")
    others = [request_key(dense, ids.view(1, 16), "l2"), request_key(dense, ids.int(), "l2")]
    others += [request_key(dense, ids, "l1"), request_key(dense, None, "l2")]
    monkeypatch.setattr("fxprune.checkpoint.low_memory.package_versions", lambda: {"fxprune": "9"})
    others.append(request_key(dense, ids, "l2"))
    monkeypatch.undo()
    before = (dense / CONFIG).stat()
    edit(dense / CONFIG, lambda data: data.update(rms_norm_eps=1e-3))
    os.utime(dense / CONFIG, ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(request_key(dense, ids, "l2"))
    text = dense / "text.txt"
    for words in ("some text", "some more"):
        text.write_text(words)
        others += [request_key(dense, text, "l2"), request_key(dense, [words], "l2")]
    others += [request_key(dense, text, "l2", character_tokenizer(chat)) for chat in (False, True)]
    assert others[-1] == request_key(dense, text, "l2", character_tokenizer(chat=True))
    assert None not in others and key not in others and len(set(others)) == len(others)
    assert request_key(dense, "wikitext2", "l2") is None is request_key(dense, iter([ids]), "l2"), "not without reading"


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


def test_offloading_is_an_option_of_a_prune(dense: Path) -> None:
    """The weights stay in files, the result is the same, and nothing is left beside the folder."""
    options: dict[str, Any] = {"importance": "l2", "compensate": "none", "tune": "none", "ratio": 0.2}
    inside = fxprune.prune(dense, **options)
    outside = fxprune.prune(dense, offload=dense.parent / "work", **options)
    assert outside.plan.to_json() == inside.plan.to_json()
    ids = token_ids(2, 8)
    assert torch.equal(outside.model(ids).logits, inside.model(ids).logits)
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]
