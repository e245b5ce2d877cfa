"""The file beside the weights that says what they are: plan, report, versions, and the header of each weight file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fxprune.errors import CheckpointError

__all__ = ["MANIFEST", "Manifest", "WeightFile", "check_weights", "read_manifest", "weight_files"]

MANIFEST = "fxprune.json"
_FORMAT = 1
"""Counted up when an earlier release could no longer read the file."""
_PACKAGES: tuple[str, ...] = ("fxprune", "torch", "transformers", "safetensors")


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
        plan: as :meth:`fxprune.Plan.to_json` writes it; None where it is not known.
        report: as :meth:`fxprune.Report.to_dict` gives it; None where it is not known.
        versions: of the packages that wrote it.
        format: of this file.
    """

    source: Mapping[str, Any]
    stock: bool
    weights: Mapping[str, WeightFile]
    plan: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in _PACKAGES})
    format: int = _FORMAT

    def to_json(self) -> str:
        """Return the manifest as a JSON document."""
        return json.dumps(asdict(self), indent=1)


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
        if data["format"] != _FORMAT:
            raise CheckpointError(
                f"written in format {data['format']}, this release reads {_FORMAT}",
                where=str(path),
                remedy="Load it with the release that wrote it: " + str(data.get("versions", {}).get("fxprune")),
            )
        weights = {str(name): WeightFile(**entry) for name, entry in data.pop("weights").items()}
        return Manifest(weights=weights, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not a manifest: {error!r}", where=str(path), remedy="Save the model again") from error


def weight_files(folder: Path) -> dict[str, WeightFile]:
    """Return the weight files in a folder by name, looked at."""
    return {
        path.name: WeightFile(path.stat().st_size, _digest(path), _header(path))
        for path in sorted(folder.glob("*.safetensors"))
    }


def check_weights(folder: Path, weights: Mapping[str, WeightFile], *, digests: bool) -> None:
    """Check that weight files are those the manifest was written for.

    Args:
        folder: the checkpoint.
        weights: from its manifest.
        digests: compare every byte; else sizes, names and shapes.

    Raises:
        CheckpointError: a file is missing, cut off or holds something else.
    """
    for name, expected in weights.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"a weight file {name!r} outside the folder", where=str(folder / MANIFEST))
        wrong = _wrong(path, expected, digests=digests)
        if wrong:
            remedy = "Copy the folder again, or save the model again"
            raise CheckpointError(wrong, where=str(path), remedy=remedy)


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
