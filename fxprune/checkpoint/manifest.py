"""The file beside the weights that says what they are: plan, report, versions, and the header of each weight file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fxprune.errors import CheckpointError
from fxprune.pipeline.arguments import MANIFEST
from fxprune.removal.plan import Plan
from fxprune.report.report import Report, package_versions

__all__ = [
    "CARD",
    "MANIFEST",
    "PAGE",
    "Manifest",
    "WeightFile",
    "check_files",
    "check_weights",
    "has_own_card",
    "other_files",
    "read_manifest",
    "strangers",
    "weight_files",
]

CARD = "README.md"
PAGE = "report.html"
"""What a person reads, these two: loading does not mind if they were edited or taken away."""
_FORMAT = 2
"""Counted up when an earlier release could no longer read the file, or would not see what it has to."""
_READABLE = (1, _FORMAT)
"""Format 1 knew the files of weights alone."""
_DECIDES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", ".py")
"""How names end of files that loaders look for by themselves, and take in place of others."""
_DECIDING = ("adapter_config.json", "generation_config.json", "config.json")
"""Other names that they look for."""

_AGAIN = "Copy the folder again, or save the model again"


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, as it was written.

    Args:
        size: in bytes.
        sha256: of the whole file.
        tensors: shape by name.
    """

    size: int
    sha256: str
    tensors: Mapping[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and where it comes from.

    Args:
        source: class, name and number of parameters of the dense model.
        stock: whether stock transformers loads it by its config alone.
        weights: the files of weights by name.
        files: SHA-256 of each other file that was written, by name.
        plan: as :meth:`fxprune.Plan.to_json` writes it; None where it is not known.
        report: as :meth:`fxprune.Report.to_dict` gives it; None where it is not known.
        versions: of the packages that wrote it.
        format: of this file.
    """

    source: Mapping[str, Any]
    stock: bool
    weights: Mapping[str, WeightFile]
    files: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)
    format: int = _FORMAT

    def to_json(self) -> str:
        """Return the manifest as a JSON document."""
        return json.dumps(asdict(self), indent=1)

    def read_plan(self) -> Plan | None:
        """Return what was removed; None where it is not known.

        Raises:
            PlanError: what is written there is no plan.
        """
        return None if self.plan is None else Plan.from_json(json.dumps(self.plan))

    def read_report(self) -> Report | None:
        """Return what the prune said of itself; None where it is not known.

        Raises:
            ArgumentError: what is written there is no report.
        """
        return None if self.report is None else Report.from_dict(self.report)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint in a folder.

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
        weights = {str(name): WeightFile(**entry) for name, entry in data.pop("weights").items()}
        found = Manifest(weights=weights, **data)
        _check_types(found)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not a manifest: {error!r}", where=str(path), remedy="Save the model again") from error


def _check_types(manifest: Any) -> None:
    """Raise a ``TypeError`` where what was read is not what the class says."""
    optional = (dict, type(None))
    fields: dict[str, Any] = {
        "source": dict,
        "stock": bool,
        "files": dict,
        "plan": optional,
        "report": optional,
        "versions": dict,
    }
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
    """Return the weight files in a folder by name, looked at."""
    return {
        path.name: WeightFile(path.stat().st_size, _digest(path), _header(path))
        for path in sorted(folder.glob("*.safetensors"))
    }


def other_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder that is not one of weights nor the manifest."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir()) if _is_other(path)}


def _is_other(path: Path) -> bool:
    return path.is_file() and path.suffix != ".safetensors" and path.name != MANIFEST


def strangers(folder: Path) -> list[Path]:
    """Return what someone put into a folder, and no loader takes; nothing where that is not known."""
    if not (folder / MANIFEST).is_file():
        return sorted(path for path in folder.iterdir() if not _is_taken(path.name)) if folder.is_dir() else []
    manifest = read_manifest(folder)
    known = _known(manifest)
    others = (path for path in folder.iterdir() if path.name not in known and not _is_taken(path.name))
    return sorted(others) if manifest.files else []


def has_own_card(folder: Path) -> bool:
    """Whether someone wrote the model card of a checkpoint, or edited ours."""
    card = folder / CARD
    if not (folder / MANIFEST).is_file():
        return card.is_file()
    return card.is_file() and _digest(card) != read_manifest(folder).files.get(CARD)


def _known(manifest: Manifest) -> set[str]:
    return {MANIFEST, *manifest.weights, *manifest.files}


def _is_taken(name: str) -> bool:
    """Whether a loader looks for a file of that name by itself."""
    return name.endswith(_DECIDES) or name in _DECIDING


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files beside the weights are those that were written, and none is there that a loader would take.

    Raises:
        CheckpointError: a file is missing, was changed, or does not belong; names it.
    """
    for name, digest in manifest.files.items():
        if name in (CARD, PAGE):
            continue
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError("this file is missing", where=str(path), remedy=_AGAIN)
        if _digest(path) != digest:
            raise CheckpointError("it is not what was written", where=str(path), remedy=_AGAIN)
    known = _known(manifest)
    for path in sorted(folder.iterdir()):
        # the first format did not say what else was written: there only weights can be told not to belong
        taken = _is_taken(path.name) if manifest.files else path.suffix == ".safetensors"
        if taken and path.name not in known:
            raise CheckpointError("does not belong to this checkpoint", where=str(path), remedy="Take it away")


def check_weights(folder: Path, weights: Mapping[str, WeightFile], *, digests: bool) -> None:
    """Check that weight files are those the manifest was written for.

    Args:
        folder: the checkpoint.
        weights: from its manifest.
        digests: compare every byte; else sizes, names and shapes.

    Raises:
        CheckpointError: a file is missing, cut off or holds something else.
    """
    if not weights:
        raise CheckpointError("names no file of weights", where=str(folder / MANIFEST), remedy="Save the model again")
    for name, expected in weights.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(
                f"a weight file {name!r} outside the folder",
                where=str(folder / MANIFEST),
                remedy="Save the model again",
            )
        wrong = _wrong(path, expected, digests=digests)
        if wrong:
            raise CheckpointError(wrong, where=str(path), remedy=_AGAIN)


def _wrong(path: Path, expected: WeightFile, *, digests: bool) -> str:
    """Return what is wrong with a weight file, in words; empty where nothing is."""
    if not path.is_file():
        return "this file of weights is missing"
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
            f"cut off or not safetensors: {error}", where=str(path), remedy="Copy the folder again"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
