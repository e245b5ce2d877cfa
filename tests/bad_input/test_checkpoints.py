"""Folders, damaged checkpoints and full disks: what cannot be saved or loaded is refused with the file at fault."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.errors import CheckpointError
from tests.bad_input.refusals import Net, check_clear, check_table
from tests.checkpoint.small import sealed
from tests.models import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    """A small Hugging Face model."""
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in two files of weights."""
    folder = tmp_path_factory.mktemp("saved") / "whole"
    fxprune.save_pretrained(model, folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


Damage = Callable[[Path], None]


def text(name: str, content: str | bytes) -> Damage:
    """Another content of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def field(name: str, **fields: Any) -> Damage:
    """Other fields of a JSON document; ``...`` takes one away."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        data.update(fields)
        kept = {key: value for key, value in data.items() if value is not ...}
        (folder / name).write_text(json.dumps(sealed(kept) if "digest" in kept else kept))

    return damage


def of_weights(**fields: Any) -> Damage:
    """Another entry of the first file of weights in the manifest."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / "fxprune.json").read_text())
        next(iter(data["weights"].values())).update(fields)
        (folder / "fxprune.json").write_text(json.dumps(sealed(data)))

    return damage


MANIFEST, CONFIG, INDEX = "fxprune.json", "config.json", "model.safetensors.index.json"
FIRST = "model-00001-of-"

DAMAGED: list[Damage] = [
    *[text(name, "") for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, "{") for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, "[]") for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, "null") for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, "[" * 100_000) for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, '{"a":' * 100_000) for name in (MANIFEST, CONFIG, INDEX)],
    *[text(name, b"\xff\xfe\0") for name in (MANIFEST, CONFIG, INDEX)],
    *[lambda folder, name=name: (folder / name).unlink() for name in (MANIFEST, CONFIG, INDEX)],  # type: ignore[misc]
    *[field(MANIFEST, format=value) for value in (99, "2", None, ..., 2.5, [], True)],
    *[field(MANIFEST, weights=value) for value in ({}, [], None, ..., 3, {"a": 3}, {"a": {}}, {"../x": {}})],
    *[
        field(MANIFEST, files=value)
        for value in ([], None, 3, {"nope": "x"}, {CONFIG: 3}, {CONFIG: "x"}, {"../x": "y"})
    ],
    *[field(MANIFEST, plan=value) for value in ([], 3, {}, "x", {"version": 1}, {"kept": {}})],
    *[field(MANIFEST, **{name: 3}) for name in ("source", "stock", "versions", "report", "nonsense")],
    *[of_weights(size=value) for value in (0, -1, "x", None, 1e400, 2**70)],
    *[of_weights(tensors=value) for value in ({}, [], None, {"a": [1]}, {"a": "x"}, {"a": None})],
    *[of_weights(sha256=3), of_weights(more=3)],
    *[field(CONFIG, hidden_size=value) for value in (0, -1, "x", None, float("inf"), float("nan"), 1e400)],
    *[field(CONFIG, architectures=value) for value in ([], None, ["Nope"], "x", ...)],
]


def test_damaged_checkpoints(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = []
    for place, damage in enumerate(DAMAGED):
        shutil.copytree(saved, tmp_path / f"{place}.damaged")
        damage(tmp_path / f"{place}.damaged")
        rows.append((tmp_path / f"{place}.damaged", f"{place}.damaged"))
    for cut in (0, 7, 100, -1):
        folder = shutil.copytree(saved, tmp_path / f"cut at {cut}")
        file = next(folder.glob(f"{FIRST}*"))
        file.write_bytes(file.read_bytes()[:cut])
        rows.append((folder, FIRST))
    rows += [(folder, "folder|nope") for folder in (None, 3, [], "", "/nope/nope", b"x", "a\0b", Path, "nope")]
    check_table(fxprune.from_pretrained, rows, capfd, error=CheckpointError)


def test_options_of_loading(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = {"verify": ("yes", 3), "model_class": (3, "LlamaForCausalLM", Net), "dtype": ("nonsense",)}
    bad |= {"device_map": (3.5,), "attn_implementation": ("nonsense",)}
    rows = [({name: value}, ".") for name, values in bad.items() for value in values]
    check_table(lambda options: fxprune.from_pretrained(saved, **options), rows, capfd)


SAVES: list[tuple[dict[str, Any], str]] = [
    *[({"folder": value}, "folder is") for value in (None, 3, [], "", b"x", "a\0b", Path)],
    *[({"max_shard_size": value}, "max_shard_size is") for value in (0, -1, None, "", "5", "0GB", "x", 1.5, [], True)],
    *[({"tokenizer": value}, "tokenizer is") for value in (3, "x", [], object())],
    *[({"plan": value}, "plan is") for value in (3, "x", {}, fxprune.Plan)],
    *[({"report": value}, "report is") for value in (3, "x", {}, fxprune.Report)],
    *[({"model": value}, "model is") for value in (None, 3, "x", Net(), fxprune.Plan())],
    ({"folder": "/proc/nope/nope"}, "cannot be written"),
]


def test_what_cannot_be_saved(model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"model": model, "folder": tmp_path / "new"}
    check_table(lambda bad: fxprune.save_pretrained(**{**given, **bad}), SAVES, capfd, error=CheckpointError)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond a few kilobytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(
    model: Any, saved: Path, tmp_path: Path, small_disk: None, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    check_clear(lambda: fxprune.save_pretrained(model, folder), "cannot be written.*room", capfd, model=model)
    assert not list(tmp_path.iterdir())
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    check_clear(lambda: fxprune.save_pretrained(model, saved), "cannot be written", capfd, error=CheckpointError)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_and_a_folder_of_someone_else(model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    check_clear(lambda: fxprune.save_pretrained(model, tmp_path / "file"), "is a file", capfd)
    check_clear(lambda: fxprune.save_pretrained(model, tmp_path), "holds files that are not", capfd)
