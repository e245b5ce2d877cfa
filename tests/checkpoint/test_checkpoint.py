"""Slim models on disk: what is written is what is read, by ours and by stock transformers, and nothing else is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import fxprune
from fxprune.checkpoint import write
from fxprune.errors import CheckpointError, FxpruneError, RatioError
from tests.models import tiny, token_ids
from tests.zoo import tiny_model

torch.set_num_threads(1)


def prune(family: str = "llama", **options: Any) -> fxprune.Result:
    """A slim model whose layers differ, unless the options say otherwise."""
    chosen = {"ratio": 0.15, "importance": "l2", "kinds": ("mlp",), "ranking": "global", "protect": (1, 0), **options}
    return fxprune.prune(tiny(family), None, **chosen)


def logits(model: Any) -> torch.Tensor:
    """Of a few fixed tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids()).logits
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """One that can be saved."""
    words = {word: i for i, word in enumerate(("<unk>", "a", "b"))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>")


@pytest.fixture(scope="module")
def uneven() -> fxprune.Result:
    """A model with layers of different widths."""
    result = prune()
    assert result.model.fxprune_overrides.block_fields
    return result


@pytest.fixture
def folder(uneven: fxprune.Result, tmp_path: Path) -> Path:
    """Its checkpoint."""
    uneven.save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"


def run_alone(code: str, *arguments: object) -> str:
    """What ``code`` prints in a fresh process that cannot import fxprune."""
    guard = "import sys; sys.path = [p for p in sys.path if p]; sys.modules['fxprune'] = None; "
    command = [sys.executable, "-I", "-c", guard + code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


GENERATE = (
    "import torch, transformers as hf; torch.manual_seed(0); "
    "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == 'True'); "
    "print(model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False).tolist())"
)


def generated(model: Any) -> str:
    """The same text, from a model of this process."""
    found = model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False)
    return str(found.tolist())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "bloom", "falcon"])
@pytest.mark.parametrize("kinds", [("mlp", "head", "channel"), ("mlp", "layer")], ids="+".join)
def test_what_is_saved_is_what_is_loaded(family: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    result = prune(family, kinds=kinds, ranking="local", protect=None if "head" in kinds else ())
    result.save_pretrained(tmp_path / "slim")
    model = fxprune.from_pretrained(tmp_path / "slim")
    assert type(model) is type(result.model)
    assert torch.equal(logits(model), logits(result.model))
    saved, loaded = result.model.state_dict(), model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert generated(model) == generated(result.model)
    own = ("_name_or_path", "dtype")
    first, second = result.model.config.to_dict(), model.config.to_dict()
    assert {**first, **dict.fromkeys(own)} == {**second, **dict.fromkeys(own)}


def test_a_config_with_an_infinite_number_is_saved(tmp_path: Path) -> None:
    """Mamba-2 limits its time steps by infinity, which transformers writes as an object that says so."""
    model = tiny_model("mamba2")
    result = fxprune.prune(model, None, importance="l2", kinds=("head",), group_ratio=0.25, protect=())
    result.save_pretrained(tmp_path / "slim")
    back = fxprune.from_pretrained(tmp_path / "slim")
    assert list(back.config.time_step_limit) == list(model.config.time_step_limit) == [0.0, float("inf")]
    assert torch.equal(logits(back), logits(result.model))


def test_a_loaded_model_is_saved_the_same_again(uneven: fxprune.Result, folder: Path, tmp_path: Path) -> None:
    model = fxprune.from_pretrained(folder)
    first = fxprune.save_pretrained(uneven.model, tmp_path / "a")
    assert first == fxprune.save_pretrained(model, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_per_layer_widths_are_in_the_schema_of_transformers(uneven: fxprune.Result, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    told = {int(index): fields for index, fields in config["per_layer_config"].items()}
    assert {f"model.layers.{i}": own for i, own in told.items()} == uneven.model.fxprune_overrides.block_fields
    layers = uneven.model.model.layers
    assert [told.get(i, config)["intermediate_size"] for i in range(len(layers))] == [
        layer.mlp.up_proj.out_features for layer in layers
    ]


def test_an_uneven_model_loads_where_fxprune_is_not_installed(uneven: fxprune.Result, folder: Path) -> None:
    assert run_alone(GENERATE, folder, True) == generated(uneven.model)


def test_its_config_can_be_read_by_anyone(folder: Path) -> None:
    """A tokenizer is looked up by the config, which a stock class refused to read."""
    assert transformers.AutoConfig.from_pretrained(folder).intermediate_size == 88
    with pytest.raises(RuntimeError, match=r"[Ss]ize mismatch|ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_uniform_model_is_a_stock_checkpoint(tmp_path: Path) -> None:
    result = prune(kinds=("mlp", "head"), ratio=0.2, uniform=True, ranking="local", protect=None)
    structure = result.save_pretrained(tmp_path / "slim")
    assert structure.is_stock and not structure.differences
    assert not list((tmp_path / "slim").glob("*.py"))
    assert "auto_map" not in (tmp_path / "slim" / "config.json").read_text()
    assert abs(result.report.achieved - 0.2) < 0.01
    assert run_alone(GENERATE, tmp_path / "slim", False) == generated(result.model)
    widths = {layer.mlp.up_proj.out_features for layer in result.model.model.layers}
    heads = {layer.self_attn.q_proj.out_features for layer in result.model.model.layers}
    assert len(widths) == len(heads) == 1
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(stock), logits(result.model))


@pytest.mark.parametrize(
    ("family", "kinds"), [("qwen3", ("mlp", "head")), ("gpt2", ("mlp",)), ("llama", ("mlp", "channel", "layer"))]
)
def test_uniform_widths_are_ones_the_stock_config_takes(family: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    result = prune(family, kinds=kinds, ratio=0.2, uniform=True, ranking="local", protect=None)
    assert result.save_pretrained(tmp_path / "slim").is_stock
    assert abs(result.report.achieved - 0.2) < 0.02
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(stock), logits(result.model))


def test_uniform_takes_the_same_fraction_of_units_where_that_is_asked() -> None:
    result = prune(uniform=True, group_ratio=0.25, ranking="local", protect=None)
    assert set(result.report.widths.values()) == {(88, 66)}


def test_widths_no_stock_config_can_say_are_refused_when_uniform() -> None:
    with pytest.raises(RatioError, match="same widths in all layers"):
        prune("bloom", uniform=True, ranking="local", protect=None)


@pytest.mark.parametrize("option", [{"protect": (1, 0)}, {"ranking": "global", "protect": None}])
def test_uniform_refuses_what_makes_layers_differ(option: dict[str, Any]) -> None:
    with pytest.raises(FxpruneError, match="uniform"):
        prune(uniform=True, **{"ranking": "local", "protect": None, **option})


def test_a_checkpoint_is_as_large_as_its_parameters(uneven: fxprune.Result, folder: Path) -> None:
    parameters = sum(p.numel() for p in uneven.model.parameters())
    held = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == parameters
    assert not [name for name in held if "grad" in name or "optim" in name]
    dense = sum(p.numel() for p in tiny("llama").parameters())
    assert parameters / dense == pytest.approx(1 - uneven.report.achieved, abs=1e-9)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "fxprune.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_fxprune.py",
        "report.html",
    }


def test_who_may_read_a_file_may_read_a_checkpoint(folder: Path) -> None:
    (folder / "other").write_text("")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {modes["other"]}


def test_gradients_and_optimisers_leave_no_trace(tmp_path: Path) -> None:
    result = prune()
    result.model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    result.save_pretrained(tmp_path / "slim")
    parameters = sum(p.numel() for p in result.model.parameters())
    assert (tmp_path / "slim" / "model.safetensors").stat().st_size < parameters * 4 + 10_000


def test_large_models_are_sharded(uneven: fxprune.Result, tmp_path: Path) -> None:
    uneven.save_pretrained(tmp_path / "slim", max_shard_size="100KB")
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 2
    assert (tmp_path / "slim" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(fxprune.from_pretrained(tmp_path / "slim")), logits(uneven.model))


def test_the_manifest_says_where_a_model_comes_from(uneven: fxprune.Result, folder: Path) -> None:
    manifest = json.loads((folder / "fxprune.json").read_text())
    assert fxprune.Plan.from_json(json.dumps(manifest["plan"])) == uneven.plan
    assert manifest["report"]["achieved"] == pytest.approx(uneven.report.achieved)
    assert manifest["versions"].keys() >= {"fxprune", "torch", "transformers"}
    assert manifest["source"]["parameters"] == uneven.report.parameters[0]
    assert manifest["source"]["class"] == type(uneven.model).__name__


def test_the_tokenizer_and_generation_config_come_along(uneven: fxprune.Result, tmp_path: Path) -> None:
    model = copy.deepcopy(uneven.model)
    model.generation_config.max_new_tokens = 7
    fxprune.save_pretrained(model, tmp_path / "slim", tokenizer())
    assert fxprune.from_pretrained(tmp_path / "slim").generation_config.max_new_tokens == 7
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "slim").convert_tokens_to_ids("b") == 2


def test_loading_takes_the_options_of_transformers(folder: Path) -> None:
    model = fxprune.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not any(p.is_meta for p in model.parameters())


def test_a_model_after_training_is_saved(folder: Path, tmp_path: Path) -> None:
    model = fxprune.from_pretrained(folder).train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    fxprune.save_pretrained(model, tmp_path / "tuned")
    assert torch.equal(logits(fxprune.from_pretrained(tmp_path / "tuned")), logits(model.eval()))


def test_a_result_without_a_model_says_what_to_do_instead(tmp_path: Path) -> None:
    result = prune("llama", kinds=("head_dim",), protect=(), ranking="local")
    assert result.model is None
    with pytest.raises(CheckpointError, match="export"):
        result.save_pretrained(tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


# ---------------------------------------------------------------------------------------------- damage


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A JSON file after a change."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def cut(folder: Path) -> None:
    """The weights end early."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def reshape(folder: Path) -> None:
    """One tensor has another shape."""
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = torch.ones(3)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def drop(folder: Path) -> None:
    """One tensor is gone."""
    held = load_file(folder / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def swap_plan(folder: Path) -> None:
    """The plan is one for another ratio."""
    plan = json.loads(prune(ratio=0.3).plan.to_json())
    edit(folder / "fxprune.json", lambda data: data.update(plan=plan))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "missing"),
    "weights cut off": (cut, "model.safetensors", "cut off"),
    "tensor of another shape": (reshape, "model.safetensors", r"\[3\] and should be \[48\]"),
    "tensor missing": (drop, "model.safetensors", "model.norm.weight is not in it"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors", "cut off"),
    "manifest missing": (lambda f: (f / "fxprune.json").unlink(), "fxprune.json", "missing"),
    "manifest no JSON": (lambda f: (f / "fxprune.json").write_text("{"), "fxprune.json", "not a manifest"),
    "manifest of a later format": (
        lambda f: edit(f / "fxprune.json", lambda data: data.update(format=99)),
        "fxprune.json",
        "format 99",
    ),
    "manifest without weights": (
        lambda f: edit(f / "fxprune.json", lambda data: data.pop("weights")),
        "fxprune.json",
        "not a manifest",
    ),
    "weights elsewhere": (
        lambda f: edit(f / "fxprune.json", lambda data: data["weights"].update({"../x": data["weights"].popitem()[1]})),
        "fxprune.json",
        "outside the folder",
    ),
    "plan of another model": (swap_plan, "fxprune.json", "plan is of another model"),
    "plan no plan": (
        lambda f: edit(f / "fxprune.json", lambda d: d.update(plan=[])),
        "fxprune.json",
        "plan is of another type",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json", "config"),
    "config of another width": (
        lambda f: edit(f / "config.json", lambda data: data["per_layer_config"].popitem()[1].clear()),
        "config.json",
        "is not what was written",
    ),
    "no weights listed": (
        lambda f: edit(f / "fxprune.json", lambda data: data.update(weights={})),
        "fxprune.json",
        "names no file of weights",
    ),
    "stray weights": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
        "model-00001-of-00002.safetensors",
        "does not belong",
    ),
    "stray adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json", "does not belong"),
    "stray code": (lambda f: (f / "modeling_other.py").write_text(""), "modeling_other.py", "does not belong"),
    "generation config edited": (
        lambda f: (f / "generation_config.json").write_text("{}"),
        "generation_config.json",
        "is not what was written",
    ),
    "manifest without end": (lambda f: (f / "fxprune.json").write_text("[" * 10**5), "fxprune.json", "not a manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(damage: str, folder: Path) -> None:
    harm, file, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        fxprune.from_pretrained(folder)
    assert file in str(caught.value)


def test_changed_bytes_are_found_on_request(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    fxprune.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="bytes are not those"):
        fxprune.from_pretrained(folder, verify=True)


def test_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        fxprune.from_pretrained(tmp_path / "nowhere")


def test_a_crash_leaves_no_half_checkpoint(
    uneven: fxprune.Result, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(write, "weight_files", fail)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match="disk full"):
            uneven.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_earlier_checkpoint_is_replaced_as_a_whole(uneven: fxprune.Result, folder: Path) -> None:
    (folder / "left_over.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    uneven.save_pretrained(folder)
    assert not (folder / "left_over.safetensors").exists()
    assert torch.equal(logits(fxprune.from_pretrained(folder)), logits(uneven.model))


def test_files_of_others_are_left_alone(uneven: fxprune.Result, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not an fxprune checkpoint"):
        uneven.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        uneven.save_pretrained(tmp_path / "letter.txt")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_model_with_adapters_is_not_taken_for_a_slim_one(uneven: fxprune.Result, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(uneven.model), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(CheckpointError, match="merge adapters first"):
        fxprune.save_pretrained(adapted.base_model.model, tmp_path / "slim")


def test_a_plan_read_back_gives_the_same_module_bit_for_bit() -> None:
    result = prune("gpt2", kinds=("mlp", "head"))
    again = fxprune.apply(tiny("gpt2"), fxprune.Plan.from_json(result.plan.to_json()))
    first, second = result.graph_module.state_dict(), again.graph_module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result.graph_module.code == again.graph_module.code
    assert torch.equal(logits(result.model), logits(again.model))
