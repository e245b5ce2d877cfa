"""A model as one file that generates: past keys and values go in, present ones come out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.files import as_export_error, replacing
from fxprune.export.onnx import run_onnx, write_onnx
from fxprune.export.program import has_kernels, plain_tensor, require_close, strip
from fxprune.graph.context import quiet

__all__ = ["export_decoder"]

Past = list[tuple[torch.Tensor, torch.Tensor]]

_SIZES = {"batch": 1, "sequence": 1, "past": 0}
"""What varies, and its least value."""


def export_decoder(model: PreTrainedModel, path: str | os.PathLike[str], *, verify: bool = True) -> Path:
    """Write a program for generation with a cache, that needs neither this package nor the model's.

    It takes ``input_ids`` ``(batch, n)``, the next tokens, and ``past``: for each block with attention its keys and
    values ``(batch, heads, m, size)`` of the ``m`` tokens before, 0 at the start. Heads may differ from block to block.
    It returns ``logits`` ``(batch, n, vocabulary)`` and ``present``, the past of the next call. A ``.pt2`` program
    takes and returns pairs, ``past=[(keys, values), ...]``; in an ONNX model these are called
    ``past_key_values.0.key`` and ``present.0.key``, with numbers that count blocks with attention.

    Args:
        model: a decoder-only language model. Sequences of a batch are of one length, without padding.
        path: where to: ``.pt2`` or ``.onnx``. Folders are made; what was there is replaced when the file is complete.
        verify: run what was exported, from an empty past and on, and compare.

    Returns:
        The path.

    Raises:
        UnknownNameError: the suffix is neither of the two.
        ExportError: the model keeps no such cache, torch cannot export it, or the packages for ONNX are missing.
        VerificationError: the program computes something else; nothing is written.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise UnknownNameError("suffix", path.suffix, _WRITERS)
    step = _Step(model.eval())
    _WRITERS[path.suffix](step, _program(step), path, verify)
    return path


class _Step(nn.Module):
    """One call of a model with a cache, in tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        embedding: Any = model.get_input_embeddings()
        self.ids = torch.randint(len(embedding.weight), (2, 7), generator=torch.Generator().manual_seed(0)).to(
            model.device
        )
        with torch.no_grad(), quiet(logging.ERROR), as_export_error():
            cache: Any = DynamicCache()
            model(input_ids=self.ids, past_key_values=cache, use_cache=True)
        self.blocks = [number for number, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
        if not self.blocks:
            raise ExportError(
                "keeps no keys and values", where="cache", remedy="Export the plain forward, with cache=False"
            )
        kept = [(cache.layers[number].keys, cache.layers[number].values) for number in self.blocks]
        self.empty: Past = [(keys[:, :, :0].clone(), values[:, :, :0].clone()) for keys, values in kept]

    def forward(self, input_ids: torch.Tensor, past: Past) -> dict[str, Any]:
        cache: Any = DynamicCache()
        for number, (keys, values) in zip(self.blocks, past, strict=True):
            cache.update(keys, values, number)
        logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
        return {"logits": logits, "present": [(cache.layers[n].keys, cache.layers[n].values) for n in self.blocks]}


def _program(step: _Step) -> torch.export.ExportedProgram:
    """Return one call as a program, at any batch, any number of tokens and any length of the past."""
    with torch.no_grad(), quiet(logging.ERROR), as_export_error():
        past = step(step.ids[:, :5], step.empty)["present"]
        inputs = {"input_ids": step.ids[:, :3].clone(), "past": [tuple(t.clone() for t in pair) for pair in past]}
        program = _traced(step, inputs)
    plain: dict[int, torch.Tensor] = {}
    for name, tensor in list(program.state_dict.items()):
        plain.setdefault(id(tensor), plain_tensor(tensor))
        program.state_dict[name] = plain[id(tensor)]
    strip(program)
    return program


def _traced(step: _Step, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Return a program over one batch and one length of the past; where a model bounds these, over what torch finds.

    Torch takes half as long where it is told that blocks share their lengths as where it has to find out.
    """

    def traced(batch: Any, sequence: Any, length: Any) -> torch.export.ExportedProgram:
        pair = ({0: batch, 2: length}, {0: batch, 2: length})
        dims = {"input_ids": {0: batch, 1: sequence}, "past": [pair for _ in inputs["past"]]}
        return torch.export.export(step, (), inputs, dynamic_shapes=dims, strict=False)

    try:
        return traced(*(torch.export.Dim(name, min=least) for name, least in _SIZES.items()))
    except Exception:  # whatever torch raises of sizes that are bounded, or of a model that it cannot export either way
        return traced(*[torch.export.Dim.AUTO] * len(_SIZES))


def _calls(step: _Step) -> list[tuple[torch.Tensor, Past, list[torch.Tensor]]]:
    """Return calls to verify with: tokens, past, and what comes out; the second goes on where the first ended."""
    made, past = [], step.empty
    with torch.no_grad(), quiet(logging.ERROR):
        for tokens in (step.ids[:, :4], step.ids[:, 4:5]):
            out = step(tokens, past)
            made.append((tokens, past, [out["logits"], *_flat(out["present"])]))
            past = out["present"]
    return made


def _flat(past: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for pair in past for tensor in pair]


def _write_program(step: _Step, program: torch.export.ExportedProgram, path: Path, verify: bool) -> None:
    for tokens, past, want in _calls(step) if verify else ():
        with torch.no_grad(), as_export_error(path):
            out = program.module()(input_ids=tokens, past=past)
        require_close(want, [out["logits"], *_flat(out["present"])], path)
    with replacing(path) as unfinished:
        torch.export.save(program, unfinished)


def _write_onnx(step: _Step, program: torch.export.ExportedProgram, path: Path, verify: bool) -> None:
    def check(written: Path) -> None:
        for tokens, past, want in _calls(step):
            require_close(want, run_onnx(written, [tokens, *_flat(past)]), path)

    pairs = [f"{number}.{part}" for number in range(len(step.blocks)) for part in ("key", "value")]
    axes: list[dict[int, str]] = [{0: "batch", 1: "sequence"}, *({0: "batch", 2: "past"} for _ in pairs)]
    write_onnx(
        program,
        path,
        inputs=["input_ids", *(f"past_key_values.{pair}" for pair in pairs)],
        outputs=["logits", *(f"present.{pair}" for pair in pairs)],
        axes=axes,
        check=check if verify and has_kernels(step) else None,
    )


_WRITERS: dict[str, Callable[[_Step, torch.export.ExportedProgram, Path, bool], None]] = {
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}
