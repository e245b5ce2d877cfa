"""A place on disk for a prune of a model that is larger than memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fxprune.checkpoint.manifest import MANIFEST
from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.unpack import unpack
from fxprune.checkpoint.whole import LOADING, require_whole
from fxprune.checkpoint.write import check_place
from fxprune.data.ranks import rank
from fxprune.errors import CheckpointError
from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.shelf import shelved
from fxprune.graph.silence import quiet

__all__ = ["load_mapped", "on_disk", "request_of"]

_REQUEST = "request.json"
"""What a run was asked to do: another run goes on from there where it is asked the same."""


@contextmanager
def on_disk(out: str | os.PathLike[str], request: str | None = None, *, force: bool = False) -> Iterator[Path]:
    """Keep what passes make in a folder ``<out>.unfinished`` beside ``out``, which is given, and goes when all is done.

    Args:
        out: where the result goes.
        request: spells what is asked for; a run that was stopped is gone on with where it was asked the same. None
            where that cannot be told.
        force: whether ``out`` may hold something else.

    Raises:
        CheckpointError: ``out`` holds something else, or nothing can be written beside it.
    """
    target = check_place(out, force=force)
    work = target.with_name(f"{target.name}.unfinished{f'-{rank()}' if rank() else ''}")
    try:
        if not _asked_before(work, request):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            (work / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot be written: {error.strerror}", where=str(work), remedy="Choose a folder that can be written to"
        ) from error
    with shelved(work, work if request is not None else None):
        yield work
    shutil.rmtree(work, ignore_errors=True)


def _asked_before(work: Path, request: str | None) -> bool:
    try:
        return request is not None and json.loads((work / _REQUEST).read_text(encoding="utf-8")) == request
    except (OSError, ValueError):
        return False


def load_mapped(source: str | os.PathLike[str], work: Path) -> PreTrainedModel:
    """Return the model in a folder, with its weights where they are: in files, read when they are used.

    transformers maps files of safetensors and takes the weights as they are, in their own dtype. A GGUF file is written
    as such files first, in float32, unless a run that was stopped did so.

    Args:
        source: the folder, or the GGUF file.
        work: a folder for what a GGUF file holds.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if (Path(source) / MANIFEST).is_file():
        return from_pretrained(source)
    loaded = attempt(_load, source, work / "dense")
    if isinstance(loaded, Refusal):
        raise CheckpointError(
            f"cannot be loaded: {loaded}",
            where=os.fspath(source),
            remedy="Pass a folder that save_pretrained wrote, or a GGUF file that transformers loads",
        ) from loaded.error
    model, told = loaded
    require_whole(source, told)
    model.config._name_or_path = os.fspath(source)
    return model


def _load(source: str | os.PathLike[str], unpacked: Path) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return the model in a folder or a GGUF file, and what transformers says of its loading."""
    if not Path(source).is_file():
        read: Any = AutoModelForCausalLM.from_pretrained
        with quiet(WARNING):  # what is left at random is refused
            model, told = read(source, dtype="auto", **LOADING)
        return model, told
    if not (unpacked / SAFE_WEIGHTS_INDEX_NAME).is_file():
        unpacked.mkdir(exist_ok=True)
        unpack(source, unpacked)
    return _load(unpacked, unpacked)


def request_of(source: str | os.PathLike[str], calibration: Any, passes: str) -> str | None:
    """Spell a prune of a folder, so that another one can be told from it; None where that is not possible.

    Args:
        source: the folder or file; on a hub, its name.
        calibration: token ids, or None; of other data it cannot be told cheaply whether they are the same.
        passes: the pipeline, as it is spelled.
    """
    if calibration is not None and not isinstance(calibration, torch.Tensor):
        return None
    folder = Path(source)
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    data = None if calibration is None else hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest()
    return json.dumps([str(folder.resolve() if folder.exists() else source), files, data, passes, torch.__version__])
