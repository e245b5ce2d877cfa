"""Prunes with weights on disk: mapped loading, unpacking of GGUF files, and the folder to resume from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from logging import WARNING
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fxprune.checkpoint.read import (
    LOADING,
    check_sizes,
    class_of,
    from_pretrained,
    offloading_parameters,
    require_all_weights,
    slim_folder,
)
from fxprune.checkpoint.write import check_place
from fxprune.data.named import is_data_set
from fxprune.data.samples import FileSamples
from fxprune.data.text import is_text
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, default_modes, quiet, replaced, silence_stderr
from fxprune.offload.atomic import locked, made_folder, wrap_disk_errors, write_file
from fxprune.offload.files import offload_to, sync_writes
from fxprune.offload.ranks import barrier, check_same, is_first, run_on_first
from fxprune.report.report import package_versions


def unpack_gguf(file: str | os.PathLike[str], folder: Path) -> None:
    """Write the model in a GGUF file as a folder that transformers loads, the tensors of a block at a time.

    transformers reads a whole file into memory. Here its reader sees the tensors of one block at a time, and they are
    written in float32 before the next are read. The index is written last: a folder without one is incomplete.
    """
    path = Path(file)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # imports every model's machinery

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    reader = gguf.GGUFReader(path)
    # the vocabulary is long, and not needed to load tensors
    fields = {key: value for key, value in reader.fields.items() if not key.startswith("tokenizer.")}
    parts: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        block = tensor.name.split(".")[:2] if tensor.name.startswith("blk.") else [tensor.name]
        parts.setdefault(".".join(block), []).append(tensor)
    places, size = dict[str, str](), 0
    with sync_writes(folder):
        for number, tensors in enumerate(parts.values()):
            view = SimpleNamespace(fields=fields, tensors=tensors)
            with replaced(gguf, GGUFReader=lambda *_, view=view: view), silence_stderr():
                found: dict[str, torch.Tensor] = load_gguf_checkpoint(str(path), True, model)["tensors"]
            if found:
                name = f"model-{number:05d}.safetensors"
                save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / name, {"format": "pt"})
                places |= dict.fromkeys(found, name)
                size += sum(tensor.nbytes for tensor in found.values())
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_file(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index), CheckpointError)


_FILES = "the files of the model"


def _parts(request: str | None) -> dict[str, Any]:
    """A request in parts, for processes to compare: a copy of a file on another machine may have another time."""
    if request is None:
        return {"whether they can be resumed": None}
    parts: dict[str, Any] = json.loads(request)
    return {**parts, _FILES: [(name, size, digest) for name, size, _, digest in parts[_FILES]]}


@contextmanager
def resumable_folder(out: str | os.PathLike[str], request: str | None = None, *, force: bool = False) -> Iterator[Path]:
    """Offload tensors to a folder ``<out>.unfinished`` beside ``out`` and yield it; it is deleted at the end.

    All processes share it. The first one says what an earlier run has done, and that run may have had another number of
    processes. A killed run is resumed by one of the same ``request``; None starts from scratch. With ``force``, ``out``
    may hold something else.

    Raises:
        CheckpointError: ``out`` cannot be written, or another run that goes on uses the folder.
    """
    target = check_place(out, force=force)
    work = target.with_name(f"{target.name}.unfinished")
    file = work / "request.json"  # a run with the same request resumes the one in the folder

    def reserve() -> None:
        stack.enter_context(made_folder(work.parent))
        stack.enter_context(locked(target.with_name(f"{target.name}.running"), CheckpointError))

    def begin() -> None:
        if request is None or not file.is_file() or file.read_text("utf-8", "replace") != json.dumps(request):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            file.write_text(json.dumps(request), encoding="utf-8")

    with ExitStack() as stack:
        with wrap_disk_errors(work, CheckpointError):
            run_on_first(reserve, CheckpointError)
        try:
            with wrap_disk_errors(work, CheckpointError):
                run_on_first(begin, CheckpointError)
                there = file.read_text("utf-8", "replace") if file.is_file() else ""
                check_same(lambda: {**_parts(request), "the files in it that they see": there}, where=str(work))
            with offload_to(work, work if request is not None else None):
                yield work
        except BaseException:  # an interrupt too leaves nothing that is of no use
            if is_first() and (request is None or not any(p.is_file() and p != file for p in work.rglob("*"))):
                shutil.rmtree(work, ignore_errors=True)  # nothing to resume from
            raise
        barrier()  # all are done with the files in it
        if is_first():
            shutil.rmtree(work, ignore_errors=True)


@default_modes()
def load_mapped(source: str | os.PathLike[str], work: Path) -> PreTrainedModel:
    """Load the model in a folder with memory-mapped weights, read when they are used.

    transformers maps safetensors files and keeps the dtype of the weights. Weights that it makes of several tensors of
    a file, such as those of experts stored one by one, are written to files of their own, one at a time. A GGUF file is
    first unpacked into such files in float32, in a folder in ``work``, unless a run that was killed did so. Processes
    share ``work``, and the first unpacks.
    """
    if (slim := slim_folder(source)) is not None:
        return from_pretrained(slim)
    loaded = attempt(_load, source, work / "dense")
    if isinstance(loaded, Refusal):
        remedy = "Pass a folder that save_pretrained wrote, or a GGUF file that transformers loads"
        what = f"cannot be loaded: {loaded}"
        raise CheckpointError(what, where=os.fspath(source), remedy=remedy) from loaded.error
    model, info = loaded
    require_all_weights(source, info, model)
    model.config._name_or_path = os.fspath(source)
    return model


def _load(source: str | os.PathLike[str], unpacked: Path) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    def unpack() -> None:
        if (unpacked / SAFE_WEIGHTS_INDEX_NAME).is_file():
            return
        check_sizes(source)
        unpacked.mkdir(exist_ok=True)
        try:
            unpack_gguf(source, unpacked)
        except BaseException:  # whatever was raised, it will be unpacked anew
            shutil.rmtree(unpacked, ignore_errors=True)
            raise

    if Path(source).is_file():
        run_on_first(unpack, CheckpointError)
        source = unpacked
    check_sizes(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with quiet(WARNING), offloading_parameters():  # missing weights are refused by the caller
        kind = class_of(config.to_dict())
        model, info = kind.from_pretrained(source, dtype="auto", trust_remote_code=False, **LOADING)
    return model, info


def request_key(
    source: str | os.PathLike[str], calibration: Any, passes: str, tokenizer: Any | None = None
) -> str | None:
    """Key that identifies a prune of a folder: its files, data, passes, tokenizer and versions of packages.

    None for data other than token ids and text in a file or in a list: whether they are the same cannot be checked
    cheaply.
    """
    data = _data_key(calibration)
    if calibration is not None and data is None:
        return None
    folder = Path(source)
    paths = [folder] if folder.is_file() else sorted(path for path in folder.glob("*") if path.is_file())
    # Small files are compared by content as well: an edited config may keep its size and its time.
    small = {path: path.read_bytes() if path.stat().st_size < 1 << 20 else b"" for path in paths}
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in small.items()}
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns, digests[path]) for path in paths]
    name = str(folder.resolve() if folder.exists() else source)
    parts = {"the path of the model": name, _FILES: files, "the samples": data, "the passes": passes}
    if tokenizer is not None:
        words: list[Any] = [getattr(tokenizer, "get_vocab", dict)(), getattr(tokenizer, "chat_template", None)]
        parts["the tokenizer"] = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()
    return json.dumps({**parts, "the versions of packages": package_versions()})


def _data_key(data: Any) -> list[Any] | None:
    """Fingerprint of calibration data; None if there are none, or if making one takes more than reading a file."""
    if isinstance(data, FileSamples):
        data = data["input_ids"]
    if isinstance(data, torch.Tensor):
        digest = hashlib.sha256(data.cpu().contiguous().numpy().tobytes()).hexdigest()
        return [digest, str(data.dtype), list(data.shape)]
    if not is_text(data):
        return None
    if isinstance(data, list | tuple):
        return [hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest(), "texts", len(data)]
    if isinstance(data, str | os.PathLike) and not is_data_set(data) and os.path.isfile(data):
        return [hashlib.sha256(Path(data).read_bytes()).hexdigest(), "file", Path(data).name]
    return None
