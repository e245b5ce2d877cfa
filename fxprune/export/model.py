"""A model as one file in the format of its suffix, also with a key-value cache as inputs and outputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from fxprune.data.built_in import built_in_samples
from fxprune.data.calibration import spread
from fxprune.data.samples import token_rows
from fxprune.data.text import is_text, text_samples
from fxprune.emit.emitted import outputs_agree
from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.gguf.quantization import quantization_named
from fxprune.export.gguf.write import export_gguf
from fxprune.export.program import (
    can_check,
    export_graph,
    plain_tensors,
    strip_metadata,
    wrap_export_errors,
    write_program,
)
from fxprune.graph.context import Refusal, attempt, eval_mode, quiet
from fxprune.pipeline.arguments import SUFFIXES, as_path
from fxprune.trace import trace
from fxprune.trace.inputs import check_merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Past = list[tuple[torch.Tensor, torch.Tensor]]


def export_decoder(model: PreTrainedModel, path: Path, *, verify: bool = True) -> Path:
    """Write a program for generation with a cache that needs neither this package nor transformers.

    It takes ``input_ids`` ``(batch, n)``, the next tokens, and ``past``: for each block with attention its keys and
    values ``(batch, heads, m, size)`` of the ``m`` tokens before, 0 at the start. Heads may differ between blocks.
    It returns ``logits`` ``(batch, n, vocabulary)`` and ``present``, the past of the next call. A ``.pt2`` program
    takes and returns pairs, ``past=[(keys, values), ...]``; in an ONNX model these are called
    ``past_key_values.0.key`` and ``present.0.key``, numbered over the blocks with attention.

    Sequences of a batch have one length, without padding. With ``verify``, the exported file is run with an empty past
    and with a longer one, and compared.
    """
    with eval_mode(model):
        step = _Step(model)
        program = _export_step(step)
        pairs = [f"{number}.{part}" for number in range(len(step.blocks)) for part in ("key", "value")]
        axes: list[dict[int, str]] = [{0: "batch", 1: "sequence"}, *({0: "batch", 2: "past"} for _ in pairs)]
        calls: list[dict[str, Any]] = []
        if verify and can_check(step, path):
            with torch.no_grad(), quiet(logging.ERROR):
                past = step(step.ids[:, :4], step.empty)["present"]
            calls.append({"input_ids": step.ids[:, :4], "past": step.empty})
            calls.append({"input_ids": step.ids[:, 4:5], "past": past})
        with wrap_export_errors(path.name):
            write_program(
                program,
                path,
                step,
                calls,
                inputs=["input_ids", *(f"past_key_values.{pair}" for pair in pairs)],
                outputs=["logits", *(f"present.{pair}" for pair in pairs)],
                axes=axes,
            )
    return path


class _Step(nn.Module):
    """One call of a model whose cache goes in and comes out as tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        embedding: Any = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(len(embedding.weight), (2, 7), generator=generator).to(model.device)
        remedy, shell = "Export the plain forward, with cache=False", "Leave --cache out"
        cache: Any = transformers.DynamicCache()
        with torch.no_grad(), quiet(logging.ERROR):
            whole = attempt(model, input_ids=self.ids, past_key_values=cache, use_cache=True)
        if isinstance(whole, Refusal):
            what = f"the model does not run with keys and values alone: {whole}"
            raise ExportError(what, where="cache", remedy=remedy, shell=shell) from whole.error
        self.blocks = [number for number, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
        if not self.blocks:
            raise ExportError("keeps no keys and values", where="cache", remedy=remedy, shell=shell)
        kept = [(cache.layers[number].keys, cache.layers[number].values) for number in self.blocks]
        self.empty: Past = [(keys[:, :, :0].clone(), values[:, :, :0].clone()) for keys, values in kept]
        with torch.no_grad(), quiet(logging.ERROR), wrap_export_errors():
            first = self(self.ids[:, :4], self.empty)
            rest = self(self.ids[:, 4:], first["present"])
        if not outputs_agree(whole.logits, torch.cat([first["logits"], rest["logits"]], dim=1)):
            what = "the model keeps more between calls than keys and values, such as the state of a recurrence"
            raise ExportError(what, where="cache", remedy=remedy, shell=shell)

    def forward(self, input_ids: torch.Tensor, past: Past) -> dict[str, Any]:
        cache: Any = transformers.DynamicCache()
        for number, (keys, values) in zip(self.blocks, past, strict=True):
            cache.update(keys, values, number)
        logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
        return {"logits": logits, "present": [(cache.layers[n].keys, cache.layers[n].values) for n in self.blocks]}


def _export_step(step: _Step) -> torch.export.ExportedProgram:
    """Export one call with dynamic batch, number of tokens and length of the past."""

    def export(batch: Any, sequence: Any, length: Any) -> torch.export.ExportedProgram:
        pair = ({0: batch, 2: length}, {0: batch, 2: length})
        dims = {"input_ids": {0: batch, 1: sequence}, "past": [pair for _ in inputs["past"]]}
        return torch.export.export(step, (), inputs, dynamic_shapes=dims, strict=False)

    with torch.no_grad(), quiet(logging.ERROR), wrap_export_errors():
        past = step(step.ids[:, :5], step.empty)["present"]
        inputs: dict[str, Any] = {
            "input_ids": step.ids[:, :3].clone(),
            "past": [tuple(t.clone() for t in pair) for pair in past],
        }
        try:  # torch takes half as long if named sizes say that all blocks have the same past
            sizes = {"batch": 1, "sequence": 1, "past": 0}  # with their least value
            program = export(*(torch.export.Dim(name, min=least) for name, least in sizes.items()))
        except Exception:  # torch may raise anything for a model that bounds these sizes, or that it cannot export
            program = export(*[torch.export.Dim.AUTO] * 3)
    program.state_dict.update(plain_tensors(program.state_dict.items()))
    strip_metadata(program)
    return program


def export_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    calibration: Any = None,
    cache: bool = False,
    verify: bool = True,
) -> Path:
    """Write a model, pruned or not, to one file that runs without this package.

    Args:
        model: a Hugging Face model, for instance from :func:`fxprune.from_pretrained`.
        path: the file to write. ``.pt2`` is a ``torch.export`` program and ``.onnx`` an ONNX model, see
            :func:`fxprune.export_graph`; ``.gguf`` a GGUF file. Folders are made; an existing file is replaced when
            the new one is complete.
        tokenizer: the tokenizer, for a GGUF file.
        like: a GGUF file with the same tokens, such as the dense model's, to copy the tokenizer from instead.
        quantization: type of the weights of a GGUF file: ``f32``, ``f16`` (the default), ``bf16``, ``q8_0``, ``q5_1``,
            ``q5_0``, ``q4_1``, ``q4_0``, ... Vectors stay in float32; embedding and output are at least ``q8_0``.
            K-quants and i-quants, ``q4_k_m``, ``q5_k_m``, ``q6_k``, ``iq4_xs``, ..., are written by ggml, of the extra
            for this format; a matrix whose rows fill no blocks of 256 is then stored in blocks of 32, with a warning.
        calibration: samples or text, as for :func:`fxprune.prune`, by which K-quants and i-quants weigh their errors;
            None for built-in text if there is a tokenizer.
        cache: whether a program takes past keys and values and returns present ones; not for GGUF files.
        verify: run the exported file and compare. The logits of a GGUF file are always compared.

    Raises:
        UnknownNameError: the suffix or the quantisation is unknown.
        ExportError: the format cannot express the model, with the reason; or an argument belongs to another format.
        VerificationError: the program computes something else; nothing is written.
    """
    check_merged(model)
    path = Path(as_path("path", path, error=ExportError))
    check_options(path, calibration=calibration, cache=cache, like=like, quantization=quantization)
    if path.suffix == ".gguf":
        kind = quantization_named(quantization or "f16")
        samples = _importance_samples(model, calibration, tokenizer) if kind.by_engine else ()
        return export_gguf(model, path, tokenizer=tokenizer, like=like, quantization=kind.name, samples=samples)
    if cache:
        return export_decoder(model, path, verify=verify)
    return export_graph(trace(model).graph_module, path, verify=verify)


def _importance_samples(model: PreTrainedModel, calibration: Any, tokenizer: Any) -> Sequence[torch.Tensor]:
    """Token ids ``(1, tokens)`` of samples; none without calibration and tokenizer."""
    # the importance is a mean over all tokens, and each sample takes a run of the model
    most, tokens = 64, 128
    if is_text(calibration):
        if tokenizer is None:
            what, remedy = "text needs the tokenizer of the model", "Pass $tokenizer, or token ids"
            raise ExportError(what, where="calibration", remedy=remedy)
        calibration = text_samples(calibration, tokenizer, None, tokens)
    elif calibration is None and tokenizer is not None:
        calibration = built_in_samples(tokenizer, tokens, most)
    if calibration is None:
        return ()
    embedding: Any = model.get_input_embeddings()
    return spread(tuple(token_rows(calibration, len(embedding.weight))), most)


def check_options(path: Path, *, cache: bool, example_inputs: Any = None, **gguf_options: Any) -> None:
    """Refuse arguments that do not apply to the format of a file; a tokenizer may be given for any."""
    if path.suffix not in SUFFIXES:
        raise UnknownNameError("suffix", path.suffix, SUFFIXES)
    if example_inputs is not None and (cache or path.suffix == ".gguf"):
        what, remedy = "$example_inputs are for a program without a cache", "Leave $example_inputs out"
        raise ExportError(what, where=path.name, remedy=remedy, argument="example_inputs")
    if path.suffix == ".gguf":
        if cache:
            what, remedy = "a GGUF file has no forward pass of its own", "Leave $cache out"
            raise ExportError(what, where="cache", remedy=remedy, argument="cache", value=cache)
        return
    for name in ("like", "quantization", "calibration"):
        if gguf_options.get(name) is not None:
            what, remedy = f"${name} is for GGUF files", f"Leave ${name} out"
            raise ExportError(what, where=path.name, remedy=remedy, argument=name, value=gguf_options[name])
