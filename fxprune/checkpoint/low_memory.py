"""A prune from folder to folder, with weights on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fxprune.checkpoint.manifest import MANIFEST
from fxprune.checkpoint.read import LOADING, from_pretrained, require_whole
from fxprune.checkpoint.write import check_place
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, quiet, unprinted
from fxprune.offload.files import shelved, written_through
from fxprune.offload.ranks import rank

__all__ = ["load_mapped", "on_disk", "request_of", "unpack"]

_BLOCK = "blk."
"""What the names of all tensors of a block begin with, followed by its number."""

_WORDS = "tokenizer."
"""What the keys of the vocabulary begin with; no tensor depends on it, and it is long."""


def unpack(file: str | os.PathLike[str], folder: Path) -> None:
    """Write the model in a GGUF file as a folder that transformers loads, the tensors of a block at a time.

    transformers reads a file whole, into memory. Here it is shown the tensors of one block after the other, and what it
    makes of them, in float32, is written before the next are read. The index is written last: a folder without one is
    not whole.

    Args:
        file: the GGUF file, of a kind that transformers loads.
        folder: where to; it has to be there.

    Raises:
        Exception: whatever transformers raises for a file that it does not load.
    """
    path = Path(file)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    reader = gguf.GGUFReader(path)
    with written_through(folder):
        places, size = _write_parts(path, reader, model, folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def _write_parts(path: Path, reader: Any, model: PreTrainedModel, folder: Path) -> tuple[dict[str, str], int]:
    """Write the tensors of one block after the other; return the file of each by its name, and the bytes of all."""
    places: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(_parts(reader.tensors)):
        with _shown(reader, tensors), unprinted():
            found: dict[str, torch.Tensor] = load_gguf_checkpoint(str(path), True, model)["tensors"]
        if found:
            name = f"model-{number:05d}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / name, {"format": "pt"})
            places |= dict.fromkeys(found, name)
            size += sum(tensor.nbytes for tensor in found.values())
    return places, size


def _parts(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """The tensors of each block together, and each of the others alone."""
    parts: dict[str, list[Any]] = {}
    for tensor in tensors:
        name = str(tensor.name)
        parts.setdefault(".".join(name.split(".")[:2]) if name.startswith(_BLOCK) else name, []).append(tensor)
    yield from parts.values()


@contextmanager
def _shown(reader: Any, tensors: Sequence[Any]) -> Iterator[None]:
    """Show transformers these tensors alone where it reads a file."""
    fields = {key: value for key, value in reader.fields.items() if not key.startswith(_WORDS)}
    view = SimpleNamespace(fields=fields, tensors=tensors)
    names = vars(gguf)
    true_reader, names["GGUFReader"] = names["GGUFReader"], lambda *_: view
    try:
        yield
    finally:
        names["GGUFReader"] = true_reader


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
