"""The file that says what the weights beside it are."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fxprune.checkpoint.manifest import MANIFEST, Manifest, check_weights, read_manifest, weight_files
from fxprune.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    manifest = Manifest({"class": "Stock"}, True, weight_files(tmp_path))
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    (name,) = found = weight_files(folder)
    raw = (folder / name).read_bytes()
    assert found[name].size == len(raw) and found[name].sha256 == hashlib.sha256(raw).hexdigest()
    assert found[name].tensors == {"a": [2, 3], "b": [4]}
    manifest = read_manifest(folder)
    assert manifest == Manifest({"class": "Stock"}, True, weight_files(folder))
    assert manifest.plan is None and "torch" in manifest.versions
    assert manifest.read_plan(folder) is None and manifest.read_report(folder) is None
    check_weights(folder, manifest.weights, digests=True)


def test_what_is_no_manifest_is_refused(folder: Path) -> None:
    for text, words in (("[]", "not a manifest"), ("{}", "not a manifest"), ('{"format": 9}', "format 9")):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_manifest(folder)
    (folder / MANIFEST).unlink()
    for place, words in ((folder, "missing"), (folder / "nowhere", "no such folder")):
        with pytest.raises(CheckpointError, match=words):
            read_manifest(place)


def test_each_difference_has_its_words(folder: Path) -> None:
    weights = weight_files(folder)
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
            check_weights(folder, {"model.safetensors": other}, digests=True)
    check_weights(folder, {"model.safetensors": replace(entry, sha256="0")}, digests=False)
    for name, words in {"../model.safetensors": "outside the folder", "other.safetensors": "is missing"}.items():
        with pytest.raises(CheckpointError, match=words):
            check_weights(folder, {name: entry}, digests=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        check_weights(folder, weights, digests=False)
