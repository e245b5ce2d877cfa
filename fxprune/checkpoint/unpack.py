"""A GGUF file as a folder of safetensors, for a prune that keeps weights on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fxprune.graph.shelf import written_through
from fxprune.graph.silence import unprinted

__all__ = ["unpack"]

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
