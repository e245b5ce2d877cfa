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
_CHUNK = 1 << 22
_PACKAGES: tuple[str, ...] = ("fxprune", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        size: bytes.
        sha256: of the whole file.
        tensors: shape by name.
    """

    size: int
    sha256: str
    tensors: Mapping[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
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
        """The manifest as a JSON document."""
        return json.dumps(asdict(self), indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``.

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
    """The weight files in ``folder``, looked at."""
    return {
        path.name: WeightFile(path.stat().st_size, _digest(path), _header(path))
        for path in sorted(folder.glob("*.safetensors"))
    }


def check_weights(folder: Path, weights: Mapping[str, WeightFile], *, digests: bool) -> None:
    """The weight files are those the manifest was written for.

    Args:
        folder: of the checkpoint.
        weights: from its manifest.
        digests: compare every byte; else sizes, names and shapes.

    Raises:
        CheckpointError: a file is missing, cut off or holds something else.
    """
    remedy = "Copy the folder again, or save the model again"
    for name, expected in weights.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"a weight file {name!r} outside the folder", where=str(folder / MANIFEST))
        if not path.is_file():
            raise CheckpointError("this file of weights is missing", where=str(path), remedy=remedy)
        held = _header(path)
        for tensor in sorted(held.keys() ^ expected.tensors.keys()):
            words = "is not in it" if tensor in expected.tensors else "does not belong in it"
            raise CheckpointError(f"{tensor} {words}", where=str(path), remedy=remedy)
        for tensor, shape in expected.tensors.items():
            if held[tensor] != list(shape):
                raise CheckpointError(
                    f"{tensor} is {held[tensor]} and should be {list(shape)}", where=str(path), remedy=remedy
                )
        if path.stat().st_size != expected.size:
            raise CheckpointError(
                f"{path.stat().st_size:,} bytes instead of {expected.size:,}", where=str(path), remedy=remedy
            )
        if digests and _digest(path) != expected.sha256:
            raise CheckpointError("its bytes are not those that were written", where=str(path), remedy=remedy)


def _header(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cut off or not safetensors: {error}", where=str(path), remedy="Copy the folder again"
        ) from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
