"""Checkpoints on disk: files, cards, and a source that stands alone."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import fxprune
from fxprune.checkpoint import write
from fxprune.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.write import MODELLING, check_place, model_card, save_pretrained, write_folder
from fxprune.emit.structure import describe_structure
from fxprune.errors import CheckpointError, FxpruneError
from fxprune.report.quality import GreedyAnswer, Quality
from tests.checkpoint.small import narrow
from tests.emit.small import small
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.zoo_classes import inputs_of, tiny_model_of


def test_the_config_says_how_blocks_differ(slim: Any, tmp_path: Path) -> None:
    structure = save_pretrained(slim, tmp_path / "slim")
    config = json.loads((tmp_path / "slim/config.json").read_text())
    assert config["per_layer_config"] == {"1": {"intermediate_size": 24}}
    assert config["fxprune"]["blocks"] == "model.layers" and config["fxprune"]["class"] == type(slim).__name__
    classes = {"AutoConfig": "LlamaConfig", "AutoModel": "LlamaModel", "AutoModelForCausalLM": type(slim).__name__}
    assert list(config["auto_map"].items()) == [(name, f"{MODELLING}.{kind}") for name, kind in classes.items()]
    assert structure == describe_structure(slim)


def test_processes_write_the_files_of_weights_together(slim: Any, tmp_path: Path) -> None:
    """The first wrote them all. One that cannot write, or does not see the folder, keeps nobody waiting."""
    alone = tmp_path / "alone"
    save_pretrained(slim, alone, max_shard_size=8000)
    wanted = {path.name: path.read_bytes() for path in alone.iterdir() if "safetensors" in path.name}
    assert sum(name.endswith(".safetensors") for name in wanted) > 3

    def work(rank: int) -> list[Any]:
        written, found = list[str](), list[Any]()
        monkeypatch, save = pytest.MonkeyPatch(), write.save_file
        monkeypatch.setattr(
            write, "save_file", lambda t, file, **o: written.append(Path(file).name) or save(t, file, **o)
        )
        save_pretrained(slim, tmp_path / "together", max_shard_size=8000)
        found.append(sorted(written))
        share = write._write_share
        monkeypatch.setattr(write, "_write_share", lambda *given: share(*given) if rank == 0 else 1 // 0)
        try:
            save_pretrained(slim, tmp_path / "refused", max_shard_size=8000)
        except (CheckpointError, ZeroDivisionError) as error:
            found.append(str(error))
        monkeypatch.setattr(write, "_write_share", share)
        if rank:
            monkeypatch.setattr(Path, "is_dir", lambda path: False)
        save_pretrained(slim, tmp_path / "unseen", max_shard_size=8000)
        monkeypatch.undo()
        return found

    first, second = in_processes(work, 2, tmp_path)
    shards = sorted(name for name in wanted if name.endswith(".safetensors"))
    assert first[0] == shards[::2] and second[0] == shards[1::2]
    assert "division" in first[1] and "division" in second[1]
    for folder in ("together", "unseen"):
        there = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if "safetensors" in path.name}
        assert there == wanted
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_fields_that_the_config_of_the_class_lacks_are_kept_apart(tmp_path: Path) -> None:
    """BEiT's blocks read a `head_dim` that its config does not have; transformers refuses one of a few layers alone."""
    model = tiny_model_of("AutoModelForSemanticSegmentation", "beit")
    chosen: Any = {"recipe": "llm-pruner", "importance": "l2", "kinds": ["head"], "ratio": 0.005, "protect": (1, 0)}
    result = fxprune.prune(model, example_inputs=inputs_of(model), **chosen)
    result.save_pretrained(tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert "per_layer_config" not in config
    assert any("head_dim" in own for own in config["fxprune"]["layers"].values())
    fxprune.from_pretrained(tmp_path / "slim")


def test_weights_of_a_conversion_that_own_widths_break_have_the_names_of_their_modules(
    slim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kimi K2.5's rotary rows are reordered by one number of heads for all layers, when it is saved and loaded."""

    def save(self: Any, folder: Path, *, save_original_format: bool = True, **options: Any) -> None:
        if save_original_format:
            raise RuntimeError("shape '[6, 2, 3]' is invalid for input of size 40")
        stock(self, folder, save_original_format=False, **options)

    stock = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    save_pretrained(slim, tmp_path / "slim")
    loaded = from_pretrained(tmp_path / "slim")
    assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), loaded.parameters(), strict=True))


def test_a_model_is_as_it_was_after_it_was_saved(slim: Any, tmp_path: Path) -> None:
    kind, unsaved = type(slim.config), set(slim.model.rotary_emb._non_persistent_buffers_set)
    slim.model.rotary_emb.inv_freq.mul_(2)
    slim.model.n_hooks = 3  # a number of Depth Pro has such a name, and was taken for a table of hooks
    save_pretrained(slim, tmp_path / "slim")
    slim.model.rotary_emb.inv_freq.div_(2)
    assert type(slim.config) is kind and slim.model.rotary_emb._non_persistent_buffers_set == unsaved


def test_more_files_go_into_the_folder_with_the_model(slim: Any, tmp_path: Path) -> None:
    """A folder that holds something else is taken by force: plain files stay, weights that a loader would take go."""
    target = tmp_path / "slim"
    target.mkdir()
    for name in ("notes", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (target / name).write_text("mine")
    for place, words in ((target, "not an fxprune checkpoint"), (target / "notes", "is a file")):
        with pytest.raises(CheckpointError, match=words):
            save_pretrained(slim, place)
    save_pretrained(slim, target, force=True, also=lambda folder: (folder / "run").write_text(str(folder != target)))
    assert (target / "run").read_text() == "True" and (target / "notes").read_text() == "mine"
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert not (target / "pytorch_model.bin").exists() and from_pretrained(target) is not None


def test_a_damaged_checkpoint_is_replaced_by_force_alone(slim: Any, tmp_path: Path) -> None:
    """It was refused when all was written, with force too, and with the advice to save the model again."""
    target = tmp_path / "slim"
    save_pretrained(slim, target)
    (target / "notes").write_text("mine")
    text = (target / MANIFEST).read_text()
    for damaged in (text[:100], text.replace('"format": 3', '"format": 4')):
        (target / MANIFEST).write_text(damaged)
        for refuse in (check_place, partial(save_pretrained, slim)):
            with pytest.raises(CheckpointError, match=r"fxprune\.json cannot be read: .*Choose a new folder"):
                refuse(target)
        save_pretrained(slim, target, force=True)
        assert from_pretrained(target) is not None and (target / "notes").read_text() == "mine"


def test_a_card_below_the_home_of_the_user_stays(slim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for in a folder called ~, and deleted; other functions wrote their files into such a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pretrained(slim, "~/slim", verify=False)
    (tmp_path / "slim/README.md").write_text("mine")
    save_pretrained(slim, "~/slim", verify=False)
    assert (tmp_path / "slim/README.md").read_text() == "mine"


def test_a_folder_is_filled_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_saved_without_the_comparison_on_request(uneven: fxprune.Result, tmp_path: Path) -> None:
    uneven.save_pretrained(tmp_path / "slim", verify=False)
    assert read_manifest(tmp_path / "slim").forward is None
    with pytest.raises(FxpruneError, match="verify"):
        uneven.save_pretrained(tmp_path / "slim", verify="yes")  # type: ignore[arg-type]


def snippets(folder: Path) -> list[str]:
    """The Python of a card, with the folder where it is."""
    found = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return [code.replace(f'"{folder.name}', f'"{folder}') for code in found]


def test_a_card_says_what_came_of_the_model(uneven: fxprune.Result, folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["fxprune", "pruned"]
    assert card.data.license is None and card.data.base_model is None
    dense, slim = uneven.report.parameters
    assert f"| parameters | {dense:,} | {slim:,} | {-uneven.report.achieved:+.1%} |" in card.text
    assert "vllm serve slim --model-impl transformers" in card.text
    assert all(words in card.text for words in ("trust_remote_code=True", "select-by-ratio{", "differ by"))
    assert "\n\n\n" not in card.text and "None" not in card.text


def test_a_card_shows_answers_as_text_and_commands_that_a_shell_reads(uneven: fxprune.Result, tmp_path: Path) -> None:
    """Answers stood on it as the model wrote them, which may be HTML; a blank in a name made two words of it."""
    quality = Quality((), (GreedyAnswer("Who?", "<!-- me", "<b>you</b>"),))
    result = replace(uneven, report=replace(uneven.report, quality=quality))
    result.save_pretrained(tmp_path / "my slim", verify=False)
    card = (tmp_path / "my slim/README.md").read_text()
    assert "- Who? Dense: &lt;!-- me Slim: &lt;b>you&lt;/b>" in card
    assert "fxprune export 'my slim' 'my slim.gguf'\n" in card and "vllm serve 'my slim' --" in card


def test_the_code_on_a_card_runs(uneven: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a shell or Python reads the name of the folder as something else."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'my "slim"'
    uneven.save_pretrained(folder)
    commands = re.findall(r"^(?:fxprune|vllm|llama-server) .*", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 4 and all(shlex.split(one)[2].startswith(folder.name) for one in commands)
    names: dict[str, Any] = {"dense": tiny("llama")}
    with torch.no_grad():
        expected = uneven.model(token_ids()).logits
        for code in snippets(folder):
            exec(code, names)
            held = names.pop("model", None) or names.pop("slim").model
            torch.testing.assert_close(held(token_ids()).logits, expected)
    assert len(snippets(folder)) == 3


def test_a_stock_checkpoint_is_loaded_by_its_class(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1, _name_or_path="owner/name")
    fxprune.save_pretrained(model, tmp_path / "stock")
    manifest = json.loads((tmp_path / "stock/fxprune.json").read_text())
    assert manifest["source"] == {"class": type(model).__name__, "name": "owner/name"} and manifest["stock"]
    card = ModelCard.load(tmp_path / "stock/README.md")
    assert card.data.base_model == "owner/name" and "trust_remote_code" not in card.text
    names: dict[str, Any] = {}
    for code in snippets(tmp_path / "stock"):
        exec(code, names)
        assert type(names.pop("model")) is type(model)


def test_what_the_dense_card_says_of_its_licence_is_kept(tmp_path: Path) -> None:
    model = narrow()
    dense = tmp_path / "dense"
    dense.mkdir()
    model.config._name_or_path = str(dense)
    said = "---\nlicense: other\nlicense_name: ours\nlanguage: en\nmetrics: [bleu]\n---\n# A model\n"
    for text, licence in ((said, "other"), ("---\n[\n---\n", None), ("", None)):
        (dense / "README.md").write_text(text)
        fxprune.save_pretrained(model, tmp_path / "slim")
        data = ModelCard.load(tmp_path / "slim/README.md").data
        assert data.license == licence and data.metrics is None
        assert data.get("license_name") == (licence and "ours") and data.language == (licence and "en")
    assert "`dense`" in (tmp_path / "slim/README.md").read_text()


def test_a_card_of_someone_else_stays(uneven: fxprune.Result, folder: Path) -> None:
    """Ours is written anew; one that was edited or written by hand is kept, whatever is saved over it."""
    ours = (folder / "README.md").read_text()
    uneven.save_pretrained(folder)
    assert (folder / "README.md").read_text() == ours
    (folder / "README.md").write_text(f"{ours}\nMine.\n")
    (folder / "report.html").unlink()
    fxprune.from_pretrained(folder, verify=True)
    for _ in range(2):
        uneven.save_pretrained(folder)
        assert (folder / "README.md").read_text() == f"{ours}\nMine.\n"
    assert (folder / "report.html").is_file()
    (folder / "README.md").unlink()
    fxprune.from_pretrained(folder)
    uneven.save_pretrained(folder)
    assert (folder / "README.md").read_text() == ours and "README.md" in read_manifest(folder).files


def test_without_a_report_a_card_says_how_to_load(tmp_path: Path) -> None:
    model = narrow()
    model.save_pretrained(tmp_path)
    text = model_card(model, tmp_path, Path("slim"), Manifest({}, False, {}), None)
    assert "How to load" in text and "How it was made" not in text and "report.html" not in text


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
    text = write._modelling("LlamaForCausalLM", "LlamaConfig", "LlamaModel")
    assert not re.search(r"^\s*(from|import) fxprune\b", text, re.M)
    module = ModuleType("modelling")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # transformers looks annotations up there
    space = vars(module)
    exec(compile(text, "modelling", "exec"), space)
    for name in ("LlamaForCausalLM", "LlamaModel"):
        assert [kind.__name__ for kind in space[name].__mro__[:2]] == [name, "Layerwise"]


def test_imports_are_left_out_as_a_whole_and_classes_of_the_user_have_no_file(tmp_path: Path) -> None:
    assert write.write_modelling(small(), tmp_path) == {} and list(tmp_path.iterdir()) == []
    path = tmp_path / "module.py"
    path.write_text("from fxprune.a import (\n    b,\n    c,\n)\nimport os\n")
    module = ModuleType("module")
    module.__file__ = str(path)
    assert write._without_own_imports(module).split() == ["import", "os"]


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
