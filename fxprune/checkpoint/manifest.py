"""The manifest ``fxprune.json``: the dense model's name, versions, and digests of the files beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fxprune.errors import CheckpointError, PlanError
from fxprune.pipeline.arguments import MANIFEST
from fxprune.removal.plan import Plan
from fxprune.report.report import Report, package_versions

__all__ = [
    "CARD",
    "MANIFEST",
    "PAGE",
    "PLAN",
    "REPORT",
    "Manifest",
    "check_files",
    "check_weights",
    "content_digest",
    "foreign_files",
    "has_user_card",
    "other_files",
    "read_manifest",
    "weight_files",
]

CARD = "README.md"
PAGE = "report.html"
"""For people, like the card: both may be edited or deleted."""
PLAN = "plan.json"
REPORT = "report.json"
_FORMAT = 3
"""Counted up when an earlier release could no longer read the file, or would miss something that it must check."""
_READABLE = (1, 2, _FORMAT)
"""Format 1 listed the files of weights only, format 2 had no digest of itself."""
_LOADED_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", ".py")
"""Endings of files that loaders look for by themselves, and prefer to others."""
_LOADED_NAMES = ("adapter_config.json", "generation_config.json", "config.json")
"""Other names that they look for."""

_COPY_AGAIN = "Copy the folder again, or save the model again"
_SAVE_AGAIN = "Save the model again"


@dataclass(frozen=True)
class WeightFile:
    """A file of weights as it was written: bytes, SHA-256 of the whole file, and the shape of each tensor."""

    size: int
    sha256: str
    tensors: Mapping[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """Contents and origin of a checkpoint.

    Args:
        source: class, name and number of parameters of the dense model.
        stock: whether stock transformers loads it by its config alone.
        weights: the files of weights by name.
        files: SHA-256 of each other file that was written, by name.
        plan: the plan as plain data in manifests of earlier releases; now it is in ``plan.json``.
        report: the report as plain data in manifests of earlier releases; now it is in ``report.json``.
        plan_digest: digest of the plan that the model came of; None if that is not known.
        forward: what one short forward pass gave, or a ``note`` why there was none; None if it was left out.
    """

    source: Mapping[str, Any]
    stock: bool
    weights: Mapping[str, WeightFile]
    files: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    plan_digest: str | None = None
    forward: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)
    format: int = _FORMAT

    def to_json(self) -> str:
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({**data, "digest": content_digest(data)}, indent=1)

    def read_plan(self, folder: Path) -> Plan | None:
        """Read the plan of the checkpoint in a folder; None if it was saved without one."""
        text = self._text(folder, PLAN, self.plan)
        try:
            return None if text is None else Plan.from_json(text)
        except PlanError as error:
            raise CheckpointError(str(error), where=str(self._place(folder, PLAN)), remedy=_SAVE_AGAIN) from error

    def read_report(self, folder: Path) -> Report | None:
        """Read the report of the checkpoint in a folder; None if it was saved without one."""
        text = self._text(folder, REPORT, self.report)
        try:
            return None if text is None else Report.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(str(error), where=str(self._place(folder, REPORT)), remedy=_SAVE_AGAIN) from error

    def _place(self, folder: Path, name: str) -> Path:
        return folder / (name if name in self.files else MANIFEST)

    def _text(self, folder: Path, name: str, embedded: Mapping[str, Any] | None) -> str | None:
        if embedded is not None:
            return json.dumps(embedded)
        if name not in self.files:  # a file of this name may be the user's
            return None
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise CheckpointError("this file is missing", where=str(folder / name), remedy=_COPY_AGAIN) from error


def content_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content: no part of it, nor the digest of a file, can be exchanged alone."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in a folder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), remedy="Pass a folder that save_pretrained wrote")
    if not path.is_file():
        remedy = "Load a model that was not saved by fxprune with transformers"
        raise CheckpointError("missing", where=str(path), remedy=remedy)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if type(data["format"]) is not int or data["format"] not in _READABLE:
            raise CheckpointError(
                f"written in format {data['format']}, this release reads {_FORMAT}",
                where=str(path),
                remedy="Load it with the release that wrote it: " + str(data.get("versions", {}).get("fxprune")),
            )
        digest = data.pop("digest", None)
        if digest != content_digest(data) and (digest is not None or data["format"] == _FORMAT):
            raise CheckpointError("its content was changed", where=str(path), remedy=_COPY_AGAIN)
        weights = {str(name): WeightFile(**entry) for name, entry in data.pop("weights").items()}
        found = Manifest(weights=weights, **data)
        _check_types(found)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not a manifest: {error!r}", where=str(path), remedy=_SAVE_AGAIN) from error


def _check_types(manifest: Any) -> None:
    fields: dict[str, Any] = {"stock": bool, **dict.fromkeys(("source", "files", "versions"), dict)}
    fields |= dict.fromkeys(("plan", "report", "forward"), (dict, type(None))) | {"plan_digest": (str, type(None))}
    wrong = [name for name, kind in fields.items() if not isinstance(getattr(manifest, name), kind)]
    wrong += [name for name, digest in manifest.files.items() if not isinstance(digest, str)] if not wrong else []
    for name, file in manifest.weights.items():
        shapes = file.tensors.values() if isinstance(file.tensors, dict) else [None]
        plain = all(isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes)
        if not plain or type(file.size) is not int or not isinstance(file.sha256, str):
            wrong.append(name)
    if wrong:
        raise TypeError(f"{wrong[0]} is of another type")


def weight_files(folder: Path) -> dict[str, WeightFile]:
    """Size, digest and tensors of each weight file in a folder, by name."""
    return {
        path.name: WeightFile(path.stat().st_size, _digest(path), _header(path))
        for path in sorted(folder.glob("*.safetensors"))
    }


def other_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder except weight files and the manifest, by name."""
    found = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors")
    return {path.name: _digest(path) for path in found if path.name != MANIFEST}


def foreign_files(folder: Path) -> list[Path]:
    """Files and folders that a user put into a checkpoint and no loader looks for; none if that is not known."""
    if not folder.is_dir():
        return []
    known: set[str] = set()
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if not manifest.files:
            return []
        known = {MANIFEST, *manifest.weights, *manifest.files}
    return sorted(path for path in folder.iterdir() if path.name not in known and not _is_loaded(path.name))


def has_user_card(folder: Path) -> bool:
    """Whether the model card of a checkpoint was written or edited by the user."""
    card = folder / CARD
    if not (folder / MANIFEST).is_file():
        return card.is_file()
    return card.is_file() and _digest(card) != read_manifest(folder).files.get(CARD)


def _is_loaded(name: str) -> bool:
    return name.endswith(_LOADED_ENDINGS) or name in _LOADED_NAMES


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files beside the weights are as they were written, and that there are no others a loader uses."""
    for name, digest in manifest.files.items():
        if name in (CARD, PAGE):
            continue
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError("this file is missing", where=str(path), remedy=_COPY_AGAIN)
        if _digest(path) != digest:
            raise CheckpointError("its content was changed", where=str(path), remedy=_COPY_AGAIN)
    known = {MANIFEST, *manifest.weights, *manifest.files}
    for path in sorted(folder.iterdir()):
        # format 1 did not list the other files: there only weight files are known not to belong
        loaded = _is_loaded(path.name) if manifest.files else path.suffix == ".safetensors"
        if loaded and path.name not in known:
            raise CheckpointError("does not belong to this checkpoint", where=str(path), remedy="Remove it")


def check_weights(folder: Path, weights: Mapping[str, WeightFile], *, digests: bool) -> None:
    """Check that weight files are those the manifest was written for: every byte, or sizes, names and shapes alone."""
    where = str(folder / MANIFEST)
    if not weights:
        raise CheckpointError("it lists no weight file", where=where, remedy=_SAVE_AGAIN)
    for name, expected in weights.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"a weight file {name!r} outside the folder", where=where, remedy=_SAVE_AGAIN)
        error = _weight_error(path, expected, digests=digests)
        if error:
            raise CheckpointError(error, where=str(path), remedy=_COPY_AGAIN)


def _weight_error(path: Path, expected: WeightFile, *, digests: bool) -> str:
    """Return how a weight file differs from its entry; empty if it does not."""
    if not path.is_file():
        return "this weight file is missing"
    held = _header(path)
    for tensor in sorted(held.keys() ^ expected.tensors.keys()):
        return f"{tensor} is not in it" if tensor in expected.tensors else f"{tensor} does not belong in it"
    for tensor, shape in expected.tensors.items():
        if held[tensor] != list(shape):
            return f"{tensor} is {held[tensor]} and should be {list(shape)}"
    size = path.stat().st_size
    if size != expected.size:
        return f"{size:,} bytes instead of {expected.size:,}"
    return "its bytes are not those that were written" if digests and _digest(path) != expected.sha256 else ""


def _header(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"truncated or not safetensors: {error}", where=str(path), remedy="Copy the folder again"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
