"""Checkpoints read from folders and hubs, and their manifests."""

import copy
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fxprune
from fxprune.checkpoint import write
from fxprune.checkpoint.manifest import MANIFEST, Manifest, check_weights, read_manifest, weight_files
from fxprune.checkpoint.read import from_pretrained, load_config_only, load_model
from fxprune.checkpoint.write import check_repository, push_folder, save_pretrained
from fxprune.data.samples import FileSamples
from fxprune.emit.emitted import PLAN_DIGEST
from fxprune.emit.snapshot import shapes_of
from fxprune.errors import CheckpointError
from fxprune.removal.plan import Plan
from tests.bad_input.refusals import LONGEST
from tests.checkpoint.small import edit, narrow
from tests.emitted import logits
from tests.models import tiny, token_ids
from tests.remembered import pruned

KEPT = list(range(24))


@pytest.fixture(scope="module")
def slim() -> Any:
    model = narrow()
    model.model.rotary_emb.inv_freq.mul_(2)
    return model


@pytest.fixture
def folder(slim: Any, tmp_path: Path) -> Path:
    save_pretrained(slim, tmp_path / "slim", plan=plan(KEPT))
    return tmp_path / "slim"


def plan(kept: list[int], removed: tuple[str, ...] = ()) -> Plan:
    return Plan({"model.layers.1.mlp.up_proj.weight": {0: kept}}, removed)


def test_a_model_is_what_it_was(slim: Any, folder: Path) -> None:
    model: Any = from_pretrained(folder)
    assert isinstance(model, type(slim)) and isinstance(model.config, type(slim.config))
    assert type(from_pretrained(folder, model_class=type(model))) is type(model)
    assert torch.equal(logits(model), logits(slim))
    assert model.model.rotary_emb._non_persistent_buffers_set == slim.model.rotary_emb._non_persistent_buffers_set
    assert model.fxprune_overrides.block_fields == slim.fxprune_overrides.block_fields


def test_a_folder_of_a_trainer_is_refused_with_what_loads_it(uneven: fxprune.Result, tmp_path: Path) -> None:
    """The remedy was transformers, which refused the shapes; commands said that the config has others."""
    uneven.model.save_pretrained(tmp_path)
    for load in (from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=r"missing|layers\.\d.* of another shape than its class") as caught:
            load(tmp_path)
        assert "type(slim).from_pretrained" in caught.value.remedy and len(str(caught.value)) < LONGEST
    assert shapes_of(type(uneven.model).from_pretrained(tmp_path)) == shapes_of(uneven.model)


@pytest.mark.parametrize("section", ["words", {"layers": []}, {"attributes": {"model.norm": 3}}, {"shapes": {"x": 1}}])
def test_a_section_that_someone_edited_is_refused_by_its_file(section: Any, folder: Path) -> None:
    edit(folder / "config.json", lambda data: data.update(fxprune=section))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(folder)


def test_the_plan_goes_by_names_of_the_dense_model(slim: Any, folder: Path) -> None:
    moved = Plan({"model.layers.2.mlp.up_proj.weight": {0: KEPT}}, ("model.layers.0",))
    for other, fits in ((moved, True), (plan(KEPT[1:]), False), (plan(KEPT, ("model.layers.0",)), False)):
        text = other.to_json()
        (folder / "plan.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        edit(folder / MANIFEST, lambda data, digest=digest: data["files"].update({"plan.json": digest}))
        if fits:
            assert torch.equal(logits(from_pretrained(folder)), logits(slim))
            continue
        with pytest.raises(CheckpointError, match="plan is of another model"):
            from_pretrained(folder)


def test_the_plan_of_another_model_of_the_same_shapes_is_refused(slim: Any, tmp_path: Path) -> None:
    """It was saved with the model, and said which units went that had not."""
    result = pruned("llama", importance="l2", kinds=("mlp",), ratio=0.1, protect=())
    other = pruned("llama", importance="random", kinds=("mlp",), ratio=0.1, protect=()).plan
    digest = vars(result.model)[PLAN_DIGEST]
    assert digest == result.plan.digest == Plan.from_json(result.plan.to_json()).digest != other.digest
    result.save_pretrained(tmp_path / "slim")
    loaded = from_pretrained(tmp_path / "slim")
    save_pretrained(loaded, tmp_path / "again")
    known = (loaded, from_pretrained(tmp_path / "again"), copy.deepcopy(result.model))
    for model in (*known, pickle.loads(pickle.dumps(result.model))):
        with pytest.raises(CheckpointError, match=r"plan: it is the plan of another model\. Pass"):
            save_pretrained(model, tmp_path / "other", plan=other)
        assert vars(model)[PLAN_DIGEST] == digest and not (tmp_path / "other").exists()
    save_pretrained(loaded, tmp_path / "other", plan=result.plan)
    assert PLAN_DIGEST not in vars(slim)
    save_pretrained(slim, tmp_path / "unknown", plan=plan(KEPT))
    assert vars(from_pretrained(tmp_path / "unknown"))[PLAN_DIGEST] == plan(KEPT).digest


def test_a_plan_that_was_exchanged_is_refused_with_its_digest(folder: Path) -> None:
    """Where the digest of the file was exchanged as well, the plan of another model was read."""
    text = plan([*KEPT[1:], 80]).to_json()
    (folder / "plan.json").write_text(text)
    data = json.loads((folder / MANIFEST).read_text())
    data["files"]["plan.json"] = hashlib.sha256(text.encode()).hexdigest()
    for change in ({}, {"plan": json.loads(text)}, {"digest": 3}):
        (folder / MANIFEST).write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=r"fxprune\.json: its content was changed"):
            from_pretrained(folder)
    del data["digest"]
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"fxprune\.json: its content was changed"):
        from_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(data | {"format": 2}))
    with pytest.raises(CheckpointError, match=r"written in format 2, this release reads 3\. Load it with the release"):
        from_pretrained(folder)


def test_buffers_of_a_model_in_half_precision_are_not_rounded(tmp_path: Path) -> None:
    """Frequencies of positions that the class makes differently came back in bfloat16."""
    slim: Any = narrow()
    frequencies = slim.model.rotary_emb.inv_freq * 1.7
    slim.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies
    save_pretrained(slim, tmp_path / "slim")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    for loaded in (from_pretrained(tmp_path / "slim"), stock):
        assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies) and loaded.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(loaded(token_ids()).logits, slim(token_ids()).logits)


def test_a_repository_is_downloaded_as_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest revision was loaded whichever was asked for, and a token was not used."""
    seen: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("fxprune.checkpoint.read.snapshot_download", download)
    model = from_pretrained("someone/something", revision="v1", token="secret", dtype="bfloat16")
    assert seen == {"name": "someone/something", "revision": "v1", "token": "secret"}
    assert model.dtype == torch.bfloat16


def test_a_slim_model_is_pruned_by_its_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock classes were asked for it, which refuse widths that differ between layers."""

    def file_of(name: str, file: str) -> str:
        if name != "someone/slim":
            raise OSError(f"{name} does not appear to have a file named {file}")
        return str(folder / file)

    monkeypatch.setattr("fxprune.checkpoint.read.cached_file", file_of)
    monkeypatch.setattr("fxprune.checkpoint.read.snapshot_download", lambda name: str(folder))
    assert torch.equal(logits(load_model("someone/slim")), logits(from_pretrained(folder)))
    assert shapes_of(load_config_only("someone/slim")) == shapes_of(load_config_only(folder))
    with pytest.raises(CheckpointError, match="someone/dense"):
        load_model("someone/dense")


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("fxprune.checkpoint.read.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="neither a folder nor on the hub: ConnectionError: offline"):
        from_pretrained("someone/something")


@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_a_config_builds_the_slim_model_every_time(slim: Any, folder: Path, place: str) -> None:
    """Entries were taken off the caller's config, so that a second model came out dense."""
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    said = config.to_json_string()
    for _ in range(2):
        with torch.device(place):
            again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert shapes_of(again) == shapes_of(slim)
    assert config.to_json_string() == said


class StandIn:
    """Takes what is uploaded, in place of a hub."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.cards: dict[str, Any] = {}
        self.private: dict[str, bool | None] = {}

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
        if name.startswith("other/"):
            raise PermissionError("403 Forbidden")
        assert exist_ok
        self.private[name] = private
        return f"{self.endpoint}/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert "fxprune" in commit_message
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        self.cards[repo_id] = ModelCard.load(Path(folder_path) / "README.md").data.to_dict()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    taken = StandIn()
    monkeypatch.setattr(write, "HfApi", lambda: taken)
    return taken


def test_a_result_is_uploaded_with_its_plan_report_and_card(taken: StandIn, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    model.config._name_or_path = "owner/dense"
    samples = FileSamples(token_ids(10, 9), "c4")
    options: dict[str, Any] = {"importance": "wanda", "recipe": "llm-pruner", "ratio": 0.1, "protect": (0, 0)}
    result = fxprune.prune(model, samples, **options)
    assert result.push_to_hub("owner/slim", private=True) == "https://hub.example/owner/slim"
    names = {"README.md", "config.json", "fxprune.json", "model.safetensors", "plan.json", "report.json", "report.html"}
    assert names <= set(taken.files["owner/slim"]) and taken.private == {"owner/slim": True}
    card = taken.cards["owner/slim"]
    assert (card["base_model"], card["pipeline_tag"], card["datasets"]) == (
        "owner/dense",
        "text-generation",
        ["allenai/c4"],
    )
    assert "license" not in card, "which is not known"
    with pytest.raises(CheckpointError, match=r"hub.example did not take it: PermissionError: 403.*hf auth login"):
        result.push_to_hub("other/slim")


def test_wrong_names_and_folders_are_refused(taken: StandIn, tmp_path: Path) -> None:
    for name in ("slim", "a/b/c", "owner/..", "owner/a b", 3):
        with pytest.raises(CheckpointError, match="is no id of a repository"):
            check_repository("repository", name)
    with pytest.raises(CheckpointError, match="no such folder"):
        push_folder(tmp_path / "none", "owner/name")
    assert taken.files == {} and taken.private == {}


@pytest.fixture
def written_folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    manifest = Manifest({"class": "Stock"}, True, weight_files(tmp_path))
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def test_a_manifest_is_read_as_it_was_written(written_folder: Path) -> None:
    (name,) = found = weight_files(written_folder)
    raw = (written_folder / name).read_bytes()
    assert found[name].size == len(raw) and found[name].sha256 == hashlib.sha256(raw).hexdigest()
    assert found[name].tensors == {"a": [2, 3], "b": [4]}
    manifest = read_manifest(written_folder)
    assert manifest == Manifest({"class": "Stock"}, True, weight_files(written_folder))
    assert "torch" in manifest.versions
    assert manifest.read_plan(written_folder) is None and manifest.read_report(written_folder) is None
    check_weights(written_folder, manifest.weights, digests=True)


def test_what_is_no_manifest_is_refused(written_folder: Path) -> None:
    for text, words in (("[]", "not a manifest"), ("{}", "not a manifest"), ('{"format": 9}', "format 9")):
        (written_folder / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_manifest(written_folder)
    (written_folder / MANIFEST).unlink()
    for place, words in ((written_folder, "missing"), (written_folder / "nowhere", "no such folder")):
        with pytest.raises(CheckpointError, match=words):
            read_manifest(place)


def test_each_difference_has_its_words(written_folder: Path) -> None:
    weights = weight_files(written_folder)
    entry = weights["model.safetensors"]
    wrong = {
        "a is not in it|c is not in it": replace(entry, tensors={**entry.tensors, "c": [1]}),
        "b does not belong in it": replace(entry, tensors={"a": [2, 3]}),
        r"a is \[2, 3\] and should be \[3, 2\]": replace(entry, tensors={"a": [3, 2], "b": [4]}),
        "bytes instead of 1": replace(entry, size=1),
        "bytes are not those": replace(entry, sha256="0"),
    }
    for words, other in wrong.items():
        with pytest.raises(CheckpointError, match=words):
            check_weights(written_folder, {"model.safetensors": other}, digests=True)
    check_weights(written_folder, {"model.safetensors": replace(entry, sha256="0")}, digests=False)
    for name, words in {"../model.safetensors": "outside the folder", "other.safetensors": "is missing"}.items():
        with pytest.raises(CheckpointError, match=words):
            check_weights(written_folder, {name: entry}, digests=False)
    path = written_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        check_weights(written_folder, weights, digests=False)
