"""Translation of the parameters of a model to the tensors and entries of a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from fxprune.errors import ExportError
from fxprune.export.gguf.format import Arch, joined_names, names_in_format, place_of
from fxprune.graph.compat import cache_of
from fxprune.graph.context import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "GGUF files hold decoders whose blocks differ only in widths; export a .pt2 or .onnx file instead"


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of queries and keys.

    ``frequencies`` are radians per position, one for each pair of channels, and ``base`` is their nominal base.
    ``scaling`` multiplies sines and cosines.
    """

    frequencies: torch.Tensor
    base: float
    scaling: float

    @property
    def dims(self) -> int:
        """Number of rotated channels of a head."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class Decoder:
    """The facts about a decoder-only language model that a file needs.

    Args:
        tensors: every parameter by name, a tied one once.
        cached: key/value heads, size of a key and size of a value, by number of a block with attention.
        rotary: rotary embedding; None without one.
        window: tokens of a sliding window; None if no block has one.
        logits: float32 logits ``(1, n, vocabulary)`` for ``tokens``.
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
    """Collect the facts about a model; it runs once on a few random tokens."""
    model.eval()
    meta = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if meta is not None:
        raise ExportError("has no values to export", where=meta, remedy="Give the model real weights instead of meta")
    config = model.config.get_text_config(decoder=True)
    # modules that store columns first are transposed; a tied tensor is there once
    transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, transformers.Conv1D)}
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    embedding: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    # 12 tokens are enough for rotations and masks to matter, and cheap
    tokens = torch.randint(len(embedding.weight), (1, 12), generator=generator).to(model.device)
    with torch.no_grad(), quiet(logging.ERROR):
        output = model(input_ids=tokens, use_cache=True)
    contexts = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = kinds is None or any(kind != "full_attention" for kind in kinds)
    return Decoder(
        config=config,
        tensors={name: t.detach().T if name in transposed else t.detach() for t, name in names.items()},
        cached=_cache_sizes(output),
        rotary=_rotary(model, config),
        epsilon=_epsilon(model),
        context=next((int(value) for name in contexts if (value := getattr(config, name, None))), 2048),
        window=int(window) if window and windowed else None,
        logits=output.logits.float().cpu(),
        tokens=tokens.cpu(),
    )


def _cache_sizes(output: Any) -> dict[int, tuple[int, int, int]]:
    """Key/value heads, size of a key and size of a value in the cache, by number of the block."""
    layers = getattr(cache_of(output), "layers", None)
    if layers is None:
        raise ExportError("keeps no cache of keys and values", where="the model", remedy=_REMEDY)
    found: dict[int, tuple[int, int, int]] = {}
    for number, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            if keys.dim() != 4:
                raise ExportError("keeps something other than keys and values", where=f"block {number}", remedy=_REMEDY)
            found[number] = (keys.shape[1], keys.shape[3], values.shape[3])
    return found


def _rotary(model: Any, config: Any) -> Rotary | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    base = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    made = {
        path: Rotary(module.inv_freq.detach().float().cpu(), base, float(getattr(module, "attention_scaling", 1.0)))
        for path, module in model.named_modules()
        if isinstance(module._buffers.get("inv_freq"), torch.Tensor)
    }
    if not made:
        return None
    (where, first), *others = made.items()
    if any(not torch.equal(o.frequencies, first.frequencies) or o.scaling != first.scaling for _, o in others):
        raise ExportError("rotates keys in several ways; the format has one", where=where, remedy=_REMEDY)
    return first


def _epsilon(model: nn.Module) -> float:
    """The epsilon that all normalisations share."""
    found = {
        path: float(value)
        for path, module in model.named_modules()
        for value in [vars(module).get("variance_epsilon", vars(module).get("eps"))]
        if value is not None
    }
    if len(set(found.values())) > 1:
        what = f"normalisations differ in epsilon: {sorted(set(found.values()))}"
        spellings = ("norm='sliced'", "--norm sliced")
        remedy, shell = (f"{_REMEDY}; a prune with {how} leaves them as they were" for how in spellings)
        raise ExportError(what, where=next(iter(found)), remedy=remedy, shell=shell)
    return next(iter(found.values()), 1e-5)


Tensors = dict[str, torch.Tensor]


class InexpressibleError(Exception):
    """The reason why an architecture of the format cannot express a model; another one may."""


@dataclass(frozen=True)
class TensorLayout:
    """Order of the rows of a model's projections, which names do not reveal.

    Args:
        fused: order in a fused tensor: ``parts`` (all queries, all keys, all values) or ``groups`` (queries, key and
            value of each key/value head).
        rotary: channels of a head that the model rotates together: ``halves`` or ``pairs``.
    """

    fused: str = "parts"
    rotary: str = "halves"


LAYOUTS = tuple(TensorLayout(fused, rotary) for rotary in ("halves", "pairs") for fused in ("parts", "groups"))
"""In the order in which they are tried, the most common first."""


@dataclass(frozen=True)
class Contents:
    """Contents of a file: tensors by name with axes as in torch, and entries without the prefix of the architecture."""

    arch: Arch
    tensors: Mapping[str, torch.Tensor]
    keys: Mapping[str, Any]


@dataclass
class _BlockTensors:
    """One block while it is laid out: its tensors by name, sizes of the cache, heads and width of the MLP."""

    number: int
    parts: Tensors
    sizes: tuple[int, int, int] | None
    heads: int = 0
    width: int = 0


def lay_out(decoder: Decoder, arch: Arch, layout: TensorLayout) -> Contents:
    """Contents of a file of one architecture for a model; raises InexpressibleError with the reason if it has none."""
    whole, blocks = _rename(decoder, arch)
    if arch.tied_only and "output.weight" in whole:
        raise InexpressibleError(f"architecture {arch.name} has a tied output, and this model an output layer")
    for block in blocks:
        _split_tensors(block, layout)
    blocks = [block for block in blocks if block.sizes is not None or block.width]
    found = {block.sizes[1:] for block in blocks if block.sizes is not None}
    if len(found) != 1:
        sizes = ", ".join(f"{key} and {value}" for key, value in sorted(found)) or "no attention at all"
        why = f"the format has one size of keys and one of values, and this model has {sizes}"
        raise InexpressibleError(f"{why}. Leave the kind head_dim out of what is pruned")
    key, value = found.pop()
    for block in blocks:
        _complete(block, arch, (key, value), whole["token_embd.weight"], block is blocks[0])
    keys = _keys(decoder, arch, blocks, whole, (key, value))
    tensors = dict(whole)
    rotated = 0 if decoder.rotary is None or arch.rotary == layout.rotary else decoder.rotary.dims
    for number, block in enumerate(blocks):
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in _arranged(block, arch, key, rotated).items()}
    if arch.offset:
        tensors |= {name: t.float() + arch.offset for name, t in tensors.items() if name.endswith("norm.weight")}
    return Contents(arch, tensors | _frequency_factors(decoder.rotary, arch, key), keys)


def _rename(decoder: Decoder, arch: Arch) -> tuple[Tensors, list[_BlockTensors]]:
    """The tensors outside blocks, and the blocks, with the names of the architecture."""
    whole: Tensors = {}
    blocks: dict[int, _BlockTensors] = {}
    for parameter, tensor in decoder.tensors.items():
        number, module = place_of(parameter)
        names, leaf = names_in_format(module, arch), parameter.rpartition(".")[2]
        if not names:
            others = names_in_format(module)
            why = f"has no place for {others[0]}" if others else "has no name for such a tensor"
            raise InexpressibleError(f"{parameter}: architecture {arch.name} {why}")
        if number is not None:
            blocks.setdefault(number, _BlockTensors(number, {}, decoder.cached.get(number)))
        parts = whole if number is None else blocks[number].parts
        parts[f"{names[-1]}.{leaf}"] = tensor
    return whole, [blocks[number] for number in sorted(blocks)]


def _split_tensors(block: _BlockTensors, layout: TensorLayout) -> None:
    """Split the fused tensors of a block, and set its number of heads and its width."""
    parts = block.parts
    if block.sizes is not None:
        pairs, key, value = block.sizes
        whole, *names = joined_names("attention")
        for leaf in ("weight", "bias"):
            fused = parts.pop(f"{whole}.{leaf}", None)
            if fused is not None:
                heads = (len(fused) - pairs * (key + value)) // key
                # with groups, each group is split alike; with parts, there is one group
                groups = pairs if layout.fused == "groups" else 1
                each = [size // groups for size in (heads * key, pairs * key, pairs * value)]
                pieces = (piece.flatten(0, 1) for piece in fused.unflatten(0, (groups, -1)).split(each, dim=1))
                parts |= dict(zip((f"{name}.{leaf}" for name in names), pieces, strict=True))
        if "attn_q.weight" not in parts:
            raise InexpressibleError(f"block {block.number} has attention of a kind that the format does not know")
        block.heads = len(parts["attn_q.weight"]) // key
    if "ffn_down.weight" in parts:
        block.width = parts["ffn_down.weight"].shape[1]
        for leaf in ("weight", "bias"):
            both = parts.get(f"ffn_up.{leaf}")
            if both is not None and len(both) == 2 * block.width:
                parts[f"ffn_gate.{leaf}"], parts[f"ffn_up.{leaf}"] = both.chunk(2)


def _complete(block: _BlockTensors, arch: Arch, sizes: tuple[int, int], embedding: torch.Tensor, first: bool) -> None:
    """Give a block without attention or MLP a small one of zeros if it must have one; refuse tensors without a place.

    An architecture reads its sizes from block 0, and one that can leave out attention drops blocks without an MLP.
    """
    hidden = embedding.shape[1]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=embedding.dtype)

    absent = (["attn_"] if block.sizes is None else []) + ([] if block.width else ["ffn_"])
    block.parts = {name: part for name, part in block.parts.items() if not name.startswith(tuple(absent))}
    if block.sizes is None and not (arch.no_attention and not first):
        key, value = sizes
        block.sizes, block.heads = (1, key, value), 1
        block.parts |= {"attn_q.weight": zeros(key, hidden), "attn_k.weight": zeros(key, hidden)}
        block.parts |= {"attn_v.weight": zeros(value, hidden), "attn_output.weight": zeros(hidden, value)}
        block.parts["attn_norm.weight"] = zeros(hidden)
        block.parts |= {f"{name}.weight": zeros(key) for name in arch.requires if name.endswith(("q_norm", "k_norm"))}
    if not block.width:
        block.width = 256  # the largest block of any quantised type
        block.parts |= {f"ffn_{name}.weight": zeros(block.width, hidden) for name in ("gate", "up")}
        block.parts |= {"ffn_down.weight": zeros(hidden, block.width), "ffn_norm.weight": zeros(hidden)}
    where = f"block {block.number}: architecture {arch.name}"
    for name in block.parts:
        tensor, _, leaf = name.rpartition(".")
        if leaf == "bias" and arch.norm == "rms" and tensor not in arch.biases:
            raise InexpressibleError(f"{where} has no bias for {tensor}")
    names = {name.rpartition(".")[0] for name in block.parts}
    lacking = [name for name in arch.requires if name not in names and block.sizes is not None]
    if lacking:
        raise InexpressibleError(f"{where} needs {lacking[0]}, which this model lacks")


_ROTATED = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias", "attn_q_norm.weight", "attn_k_norm.weight")
"""Tensors of a block whose rows are the channels of queries or keys."""


def _arranged(block: _BlockTensors, arch: Arch, size: int, rotated: int) -> Tensors:
    """The tensors of a block in the order of an architecture, which may rotate other channels and fuse tensors."""
    parts = dict(block.parts)
    for name in _ROTATED if rotated and block.sizes is not None else ():
        if name in parts:  # from halves to pairs, or from pairs to halves
            heads = parts[name].unflatten(0, (-1, size))
            shape = (2, rotated // 2) if arch.rotary == "pairs" else (rotated // 2, 2)
            first = heads[:, :rotated].unflatten(1, shape).transpose(1, 2).flatten(1, 2)
            parts[name] = torch.cat([first, heads[:, rotated:]], 1).flatten(0, 1)
    for part, wanted in (("attention", arch.fused), ("mlp", arch.stacked)):
        whole, *pieces = joined_names(part)
        for leaf in ("weight", "bias") if wanted else ():
            if f"{pieces[0]}.{leaf}" in parts:
                parts[f"{whole}.{leaf}"] = torch.cat([parts.pop(f"{piece}.{leaf}") for piece in pieces])
    return parts


def _frequency_factors(rotary: Rotary | None, arch: Arch, size: int) -> Tensors:
    """The tensor that divides the frequencies that the base gives, if they are not the model's."""
    if rotary is None:
        return {}
    if rotary.dims < size and not arch.partial:
        why = f"architecture {arch.name} rotates whole heads, and this model {rotary.dims} of {size} channels"
        raise InexpressibleError(why)
    if rotary.scaling != 1:
        raise InexpressibleError("scales its rotary embedding, which is not supported")
    exponents = torch.arange(0, rotary.dims, 2, dtype=torch.float64) / rotary.dims
    factors = rotary.base**-exponents / rotary.frequencies.double()
    if bool(((factors - 1).abs() < 1e-5).all()):
        return {}
    if not arch.factors:
        why = f"architecture {arch.name} has only the frequencies of its base, and this model others"
        raise InexpressibleError(why)
    return {"rope_freqs.weight": factors.float()}


def _keys(
    decoder: Decoder, arch: Arch, blocks: list[_BlockTensors], whole: Tensors, sizes: tuple[int, int]
) -> dict[str, Any]:
    def for_all(what: str, numbers: list[int]) -> int | list[int]:
        """One number if it is that of all blocks; else all, if the architecture has one for each block."""
        if len(set(numbers)) == 1:
            return numbers[0]
        if not arch.arrays:
            why = f"architecture {arch.name} has one number of {what} for all blocks, and here are {numbers}"
            raise InexpressibleError(why)
        return numbers

    heads = for_all("heads", [block.heads for block in blocks])
    pairs = for_all("key/value heads", [block.sizes[0] if block.sizes else 0 for block in blocks])
    epsilon = "layer_norm_rms_epsilon" if arch.norm == "rms" else "layer_norm_epsilon"
    rows, hidden = whole["token_embd.weight"].shape
    kinds = list(getattr(decoder.config, "layer_types", None) or ())
    every, context = arch.window_every, decoder.context
    full = [(number + 1) % every == 0 for number in range(len(kinds))] if every else []
    if decoder.window is not None and not (kinds and full == [kind == "full_attention" for kind in kinds]):
        context = min(context, decoder.window)  # the architecture lacks such windows
    keys: dict[str, Any] = {
        "vocab_size": rows,
        "context_length": context,
        "embedding_length": hidden,
        "block_count": len(blocks),
        "feed_forward_length": for_all("MLP widths", [block.width for block in blocks]),
        "attention.head_count": heads,
        "attention.head_count_kv": pairs,
        "attention.key_length": sizes[0],
        "attention.value_length": sizes[1],
        f"attention.{epsilon}": decoder.epsilon,
    }
    if decoder.rotary is not None:
        keys |= {"rope.dimension_count": decoder.rotary.dims, "rope.freq_base": decoder.rotary.base}
    for key, source in arch.keys.items():  # the name of a field of the config, or a constant
        value = getattr(decoder.config, source, None) if isinstance(source, str) else source
        if value is not None:
            keys[key] = value
    return keys
