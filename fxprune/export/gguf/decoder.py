"""What a GGUF file has to say about a model, read off the model: parameters, sizes of its cache, rotation, numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fxprune.errors import ExportError
from fxprune.graph.silence import quiet

__all__ = ["Decoder", "Rotary", "read_decoder"]

_OTHERS = "GGUF files hold decoders whose blocks share all but widths; export a .pt2 or .onnx file instead"


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys.

    Args:
        frequencies: angle for each position, in radians, one for each pair of channels.
        base: that the file tells; where it does not give the frequencies, what divides them is in ``factors``.
        scaling: what sines and cosines are multiplied by.
    """

    frequencies: torch.Tensor
    base: float
    scaling: float

    @property
    def dims(self) -> int:
        """How many channels of a head are turned."""
        return 2 * len(self.frequencies)

    @property
    def factors(self) -> torch.Tensor | None:
        """What the frequencies of the base are divided by; None where all are ones."""
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims
        factors = self.base**-exponents / self.frequencies.double()
        return None if bool(((factors - 1).abs() < 1e-5).all()) else factors.float()


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model, as far as a file has to know it.

    Args:
        config: that describes the decoder.
        tensors: every parameter by its name, a tied one once.
        cached: by number of a block with attention, key/value heads, and the sizes of a key and of a value.
        rotary: None where nothing is turned.
        epsilon: of all normalisations.
        context: tokens that the model was made for.
        window: tokens that blocks with a window see; None where there are none.
        logits: what it says to ``tokens``, float32 ``(1, n, vocabulary)``.
        tokens: ``(1, n)``.
    """

    config: Any
    tensors: Mapping[str, torch.Tensor]
    cached: Mapping[int, tuple[int, int, int]]
    rotary: Rotary | None
    epsilon: float
    context: int
    window: int | None
    logits: torch.Tensor
    tokens: torch.Tensor


def read_decoder(model: PreTrainedModel) -> Decoder:
    """Read off a model what a file has to say about it; it is run once, on a few random tokens.

    Raises:
        ExportError: it keeps no keys and values, it holds tensors without values, or its parts differ in what is one
            number in the format.
    """
    model.eval()
    meta = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if meta is not None:
        raise ExportError("has no values to export", where=meta, remedy="Give the model real weights instead of meta")
    config = model.config.get_text_config(decoder=True)
    embedding: Any = model.get_input_embeddings()
    tokens = torch.randint(len(embedding.weight), (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    with torch.no_grad(), quiet(logging.ERROR):
        output = model(input_ids=tokens, use_cache=True)
    return Decoder(
        config=config,
        tensors=_tensors(model),
        cached=dict(_cached(output)),
        rotary=_rotary(model, config),
        epsilon=_epsilon(model),
        context=_context(config),
        window=_window(config),
        logits=output.logits.float().cpu(),
        tokens=tokens.cpu(),
    )


_TOKENS = 12
"""Enough for rotations and masks to show, at next to no cost."""


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters and what else a checkpoint holds; those of a module that stores columns first, turned."""
    turned = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().T if name in turned else tensor.detach()
    return found


def _cached(output: Any) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield for each block what its attention has put into the cache."""
    cache = vars(output).get("cache") or output.get("past_key_values")
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ExportError("keeps no cache of keys and values", where="the model", remedy=_OTHERS)
    for number, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            if keys.dim() != 4:
                raise ExportError("keeps something else than keys and values", where=f"block {number}", remedy=_OTHERS)
            yield number, (keys.shape[1], keys.shape[3], values.shape[3])


def _rotary(model: nn.Module, config: Any) -> Rotary | None:
    buffers = {path: module._buffers.get("inv_freq") for path, module in model.named_modules()}
    found: dict[str, Any] = {
        path: model.get_submodule(path) for path, held in buffers.items() if isinstance(held, torch.Tensor)
    }
    if not found:
        return None
    told = getattr(config, "rope_parameters", None) or {}
    base = float(told.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    made = [
        Rotary(module.inv_freq.detach().float().cpu(), base, float(getattr(module, "attention_scaling", 1.0)))
        for module in found.values()
    ]
    if any(not torch.equal(one.frequencies, made[0].frequencies) or one.scaling != made[0].scaling for one in made):
        raise ExportError("turns keys in several ways, and the format has one", where=next(iter(found)), remedy=_OTHERS)
    return made[0]


def _epsilon(model: nn.Module) -> float:
    """Return the epsilon that all normalisations share."""
    found = {
        path: float(value)
        for path, module in model.named_modules()
        for value in [vars(module).get("variance_epsilon", vars(module).get("eps"))]
        if value is not None
    }
    if len(set(found.values())) > 1:
        told = f"normalisations differ in epsilon: {sorted(set(found.values()))}"
        remedy = f"{_OTHERS}; a prune with norm='sliced' leaves them as they were"
        raise ExportError(told, where=next(iter(found)), remedy=remedy)
    return next(iter(found.values()), 1e-5)


def _context(config: Any) -> int:
    """Return how many tokens a model was made for."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 2048)


def _window(config: Any) -> int | None:
    """Return how many tokens some blocks see; None where all see everything."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = kinds is None or any(kind != "full_attention" for kind in kinds)
    return int(window) if window and windowed else None
