"""Writing of GGUF files, one quantised tensor at a time."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from fxprune.errors import ExportError, FxpruneError
from fxprune.export.gguf.format import Type, load_data
from fxprune.export.gguf.layout import Contents, read_decoder
from fxprune.export.gguf.quantization import (
    describe_fallbacks,
    needs_importance,
    quantization_named,
    quantize,
    tensor_types,
)
from fxprune.export.gguf.reference import find_contents, input_importance
from fxprune.export.gguf.tokenizer import Entry, copy_tokenizer, describe_tokenizer, entry_of
from fxprune.export.program import wrap_export_errors
from fxprune.masking.compare import ROUGH, TOLERANCE
from fxprune.offload.atomic import atomic_path
from fxprune.removal.formats import Format

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def most_common_type(path: str | os.PathLike[str]) -> str:
    """Quantisation of a GGUF file, or the type of most of its weights; ``q8_0`` if that cannot be written here."""
    reader = gguf.GGUFReader(path)
    sizes: Counter[Type] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    (kind, _) = sizes.most_common(1)[0]
    entry = reader.get_field("general.file_type")
    numbers: dict[str, int] = load_data("archs")["file_types"]
    named = [name for name, number in numbers.items() if entry is not None and number == entry.contents()]
    for name in (*named, kind.name):
        with suppress(FxpruneError):
            return quantization_named(name).name
    return "q8_0"


def _check_row_sizes(contents: Contents, types: Mapping[str, Type], quantization: Format) -> None:
    """Refuse rows that are not a multiple of the block size of their type, with the ``round_to`` that avoids them."""
    misfits: dict[str, str] = {}
    sizes = []
    for name, tensor in contents.tensors.items():
        size, row = gguf.GGML_QUANT_SIZES[types[name]][0], tensor.shape[-1]
        if row % size == 0:
            continue
        step, kind_of_units, hint = size, "mlp" if ".ffn_down." in name else "channel", ""
        if ".attn_output." in name:
            step, kind_of_units = size // math.gcd(size, contents.keys["attention.value_length"]), "head"
            hint = " (in query heads; with several per key/value head, less may do)"
        if kind_of_units not in misfits:
            would = f"round_to={step} for the kind {kind_of_units} would do{hint}"
            misfits[kind_of_units] = f"{name} has rows of {row:,}: {would}"
            sizes.append(size)
    if not misfits:
        return
    what = f"{quantization.name} stores blocks of {min(sizes)} values along a row. {'; '.join(misfits.values())}"
    raise ExportError(what, where="quantization", remedy="Or choose f16")


def _write_gguf(
    contents: Contents,
    tokenizer: Iterable[Entry],
    path: Path,
    quantization: Format,
    types: Mapping[str, Type],
    importance: Mapping[str, torch.Tensor],
    name: str,
) -> None:
    """Write a file, with the type of each tensor and a human-readable ``name`` of the model."""
    writer = gguf.GGUFWriter(path, contents.arch.name)
    numbers: dict[str, int] = load_data("archs")["file_types"]
    entries = [entry_of(f"{contents.arch.name}.{key}", value) for key, value in contents.keys.items()]
    with closing(writer):
        writer.add_name(name)
        writer.add_file_type(numbers.get(quantization.name, numbers["other"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for entry in (*entries, *tokenizer):
            writer.add_key_value(entry.key, entry.value, entry.kind, entry.inner)
        for part, tensor in contents.tensors.items():
            size, stored = gguf.GGML_QUANT_SIZES[types[part]]
            bytes_ = tensor.numel() // size * stored
            writer.add_tensor_info(part, list(tensor.shape), np.dtype(np.float32), bytes_, types[part])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        for part, tensor in contents.tensors.items():
            values, kind = tensor.detach().float().cpu().contiguous().numpy(), types[part]
            if quantization.by_engine and kind is not Type.F32:
                weights = importance.get(part)
                packed = quantize(values, kind, None if weights is None else weights.numpy())
            else:
                packed = gguf.quants.quantize(values, kind)
            writer.write_padding(file, file.tell())
            file.write(np.ascontiguousarray(packed).data)  # the writer's own way loses the error of a full disk
            writer.write_padding(file, packed.nbytes)
            del values, packed  # before those of the next tensor are made


def export_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
    quantization: str = "f16",
    samples: Iterable[torch.Tensor] = (),
) -> Path:
    """Write a model as a GGUF file, with its tokenizer and chat template.

    Blocks may differ in numbers of heads and in width, and may lack attention or an MLP. The logits of the file in
    float32 are compared with the model's before anything is written. Arguments that are not listed here are those of
    :func:`fxprune.export_model`.

    Args:
        samples: token ids ``(1, tokens)`` each; K-quants and i-quants weigh the error of a weight by the mean square of
            its input on them.

    Raises:
        UnknownNameError: the quantisation is unknown.
        ExportError: the format cannot express the model or the tokenizer, with the reason; or rows are not a multiple
            of the block size of the type, with the ``round_to`` that avoids it; or a type needs samples, or ggml.
    """
    path, kind = Path(path), quantization_named(quantization)
    if like is None and tokenizer is None:
        what = "a GGUF file holds its tokenizer, and none is given"
        shell = "Save the model's own tokenizer in its folder, or run `fxprune export` with --like and a GGUF file"
        remedy = "Pass tokenizer=, or like= and a GGUF file to copy from"
        raise ExportError(what, where="tokenizer", remedy=remedy, shell=shell)
    contents, entries = check_gguf(model, tokenizer=tokenizer, like=like)
    shapes = {name: tuple(tensor.shape) for name, tensor in contents.tensors.items()}
    types = tensor_types(kind, shapes, contents.keys["block_count"])
    _check_row_sizes(contents, types, kind)
    importance: Mapping[str, torch.Tensor] = {}
    if kind.by_engine:
        fallbacks = describe_fallbacks(kind, shapes, types, contents.keys["block_count"])
        if fallbacks:
            warnings.warn(f"{kind.name}: {fallbacks}", stacklevel=3)
        importance = input_importance(contents, samples)
        lacking = {t.name.lower() for name, t in types.items() if name not in importance and needs_importance(t)}
        if lacking:
            what = f"{', '.join(sorted(lacking))} can be written only with an importance of each input"
            raise ExportError(what, where="quantization", remedy="Pass calibration samples, or choose q4_k_m")
    with wrap_export_errors(path.name), atomic_path(path, ExportError, parents=True) as unfinished:
        _write_gguf(contents, entries, unfinished, kind, types, importance, path.stem)
    return path


def check_gguf(
    model: PreTrainedModel, *, tokenizer: Any = None, like: str | os.PathLike[str] | None = None
) -> tuple[Contents, list[Entry]]:
    """Tensors and metadata of a model for a GGUF file, and the entries of its tokenizer.

    The widths and numbers of heads after a prune may still be refused later.

    Raises:
        ExportError: the format cannot express the model.
    """
    decoder = read_decoder(model)
    narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in decoder.tensors.values())
    contents = find_contents(decoder, ROUGH if narrow else TOLERANCE)
    rows = contents.keys["vocab_size"]
    entries = copy_tokenizer(like, rows) if like is not None else describe_tokenizer(tokenizer, rows)
    empty = [entry.key for entry in entries if entry.kind == gguf.GGUFValueType.ARRAY and not len(entry.value)]
    if empty:
        what = f"has no {empty[0].rpartition('.')[2]}, and an empty list cannot be written"
        raise ExportError(what, where="tokenizer", remedy="Pass a tokenizer, or a GGUF file, that has some")
    return contents, entries
