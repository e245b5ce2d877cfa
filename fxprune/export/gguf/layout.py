"""From the parameters of a model to the tensors of a GGUF file."""

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
from fxprune.export.gguf.format import Arch, joined, name_elsewhere, names_in_format, place_of
from fxprune.graph.context import quiet

__all__ = ["LAYOUTS", "Contents", "Decoder", "Rotary", "TensorLayout", "Unsaid", "lay_out", "read_decoder"]

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


Tensors = dict[str, torch.Tensor]


class Unsaid(Exception):
    """Why an architecture of the format cannot say a model; another one may."""


@dataclass(frozen=True)
class TensorLayout:
    """How a model orders the rows of its projections, which no name tells.

    Args:
        fused: of one tensor for queries, keys and values: ``parts`` (all queries, all keys, all values), or ``groups``
            (these three for each key/value head).
        rotary: which channels of a head the model turns together: ``halves``, or ``pairs``.
    """

    fused: str = "parts"
    rotary: str = "halves"


LAYOUTS = tuple(TensorLayout(fused, rotary) for rotary in ("halves", "pairs") for fused in ("parts", "groups"))
"""In the order in which they are tried: the most common first."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Args:
        arch: its architecture.
        tensors: by their names in the format, in float or what the model has; as torch orders axes.
        keys: the entries about the model, without the name of the architecture before them.
    """

    arch: Arch
    tensors: Mapping[str, torch.Tensor]
    keys: Mapping[str, Any]


@dataclass
class _BlockTensors:
    """One block on its way into a file."""

    number: int
    parts: Tensors
    sizes: tuple[int, int, int] | None
    heads: int = 0
    width: int = 0


def lay_out(decoder: Decoder, arch: Arch, layout: TensorLayout) -> Contents:
    """Return what a file of an architecture holds for a model.

    Raises:
        Unsaid: the architecture cannot say it; with the reason.
    """
    whole, blocks = _named(decoder, arch)
    _tie(whole, arch)
    blocks = [block for block in blocks if _split(block, layout)]
    key, value = _head_sizes(decoder, blocks)
    for block in blocks:
        _stand_in(block, arch, (key, value), whole["token_embd.weight"], block is blocks[0])
        _require_room(block, arch)
    _require_equal(blocks, arch)
    tensors = dict(whole)
    for number, block in enumerate(blocks):
        _turn(block, arch, decoder, layout)
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in _joined(block, arch).items()}
    if arch.offset:
        tensors |= {name: t.float() + arch.offset for name, t in tensors.items() if name.endswith("norm.weight")}
    tensors |= _rotation(decoder, arch, key)
    return Contents(arch, tensors, _keys(decoder, arch, blocks, whole, (key, value)))


def _named(decoder: Decoder, arch: Arch) -> tuple[Tensors, list[_BlockTensors]]:
    """Return the tensors outside blocks, and the blocks, by the names that the architecture has for them."""
    whole: Tensors = {}
    blocks: dict[int, _BlockTensors] = {}
    for parameter, tensor in decoder.tensors.items():
        number, module = place_of(parameter)
        names, leaf = names_in_format(module, arch), parameter.rpartition(".")[2]
        if not names:
            other = name_elsewhere(module)
            told = f"has no place for {other}" if other else "has no name for such a tensor"
            raise Unsaid(f"{parameter}: architecture {arch.name} {told}")
        if number is not None:
            blocks.setdefault(number, _BlockTensors(number, {}, decoder.cached.get(number)))
        parts = whole if number is None else blocks[number].parts
        parts[f"{names[-1]}.{leaf}"] = tensor
    return whole, [blocks[number] for number in sorted(blocks)]


def _tie(whole: Tensors, arch: Arch) -> None:
    if arch.tied_only and "output.weight" in whole:
        raise Unsaid(f"architecture {arch.name} has the embedding for its output, and this model an output layer")


def _split(block: _BlockTensors, layout: TensorLayout) -> bool:
    """Split tensors that are several; tell numbers of heads and width. Return whether the block does anything."""
    parts = block.parts
    if block.sizes is not None:
        for leaf in ("weight", "bias"):
            whole, *names = (f"{name}.{leaf}" for name in joined("attention"))
            fused = parts.pop(whole, None)
            if fused is not None:
                parts |= dict(zip(names, _unfused(fused, block.sizes, layout), strict=True))
        if "attn_q.weight" not in parts:
            raise Unsaid(f"block {block.number} has attention of a kind that the format does not know")
        block.heads = len(parts["attn_q.weight"]) // block.sizes[1]
    if "ffn_down.weight" in parts:
        block.width = parts["ffn_down.weight"].shape[1]
        for leaf in ("weight", "bias"):
            both = parts.get(f"ffn_up.{leaf}")
            if both is not None and len(both) == 2 * block.width:
                parts[f"ffn_gate.{leaf}"], parts[f"ffn_up.{leaf}"] = both.chunk(2)
    return block.sizes is not None or block.width > 0


def _unfused(fused: torch.Tensor, sizes: tuple[int, int, int], layout: TensorLayout) -> Iterator[torch.Tensor]:
    """Yield queries, keys and values."""
    pairs, key, value = sizes
    heads = (len(fused) - pairs * (key + value)) // key
    each = [heads * key, pairs * key, pairs * value]
    if layout.fused == "parts":
        yield from fused.split(each)
        return
    for part in fused.unflatten(0, (pairs, -1)).split([size // pairs for size in each], dim=1):
        yield part.flatten(0, 1)


def _head_sizes(decoder: Decoder, blocks: list[_BlockTensors]) -> tuple[int, int]:
    """Return the sizes of a key and of a value, which the format has once."""
    found = {block.sizes[1:] for block in blocks if block.sizes is not None}
    if len(found) != 1:
        told = ", ".join(f"{key} and {value}" for key, value in sorted(found)) or "no attention at all"
        raise Unsaid(
            f"the format has one size of keys and one of values, and this model has {told}. "
            "Leave the kind head_dim out of what is pruned"
        )
    return next(iter(found))


def _stand_in(block: _BlockTensors, arch: Arch, sizes: tuple[int, int], embedding: torch.Tensor, first: bool) -> None:
    """Give a block that lacks attention, or an MLP, a small one of zeros where the format cannot leave it out.

    An architecture takes its sizes from block 0; and one that leaves attention out drops a block without an MLP.
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
        block.width = _LEAST
        block.parts |= {f"ffn_{name}.weight": zeros(_LEAST, hidden) for name in ("gate", "up")}
        block.parts |= {"ffn_down.weight": zeros(hidden, _LEAST), "ffn_norm.weight": zeros(hidden)}


_LEAST = 256
"""Width of an MLP of zeros: the largest block of any quantised type."""


def _require_room(block: _BlockTensors, arch: Arch) -> None:
    where = f"block {block.number}"
    names = {name.rpartition(".")[0] for name in block.parts}
    for name in block.parts:
        tensor, _, leaf = name.rpartition(".")
        if leaf == "bias" and arch.norm == "rms" and tensor not in arch.biases:
            raise Unsaid(f"{where}: architecture {arch.name} has no bias for {tensor}")
    lacking = [name for name in arch.requires if name not in names and block.sizes is not None]
    if lacking:
        raise Unsaid(f"{where}: architecture {arch.name} needs {lacking[0]}, which this model has not")


def _require_equal(blocks: list[_BlockTensors], arch: Arch) -> None:
    told = {"heads": [b.heads for b in blocks], "key/value heads": [b.sizes[0] if b.sizes else 0 for b in blocks]}
    told["MLP widths"] = [block.width for block in blocks]
    for what, numbers in told.items():
        if len(set(numbers)) > 1 and not arch.arrays:
            raise Unsaid(f"architecture {arch.name} has one number of {what} for all blocks, and here are {numbers}")


def _turn(block: _BlockTensors, arch: Arch, decoder: Decoder, layout: TensorLayout) -> None:
    """Put the channels of queries and keys in the order in which the architecture turns them."""
    if decoder.rotary is None or block.sizes is None or arch.rotary == layout.rotary:
        return
    for name in (
        "attn_q.weight",
        "attn_q.bias",
        "attn_k.weight",
        "attn_k.bias",
        "attn_q_norm.weight",
        "attn_k_norm.weight",
    ):
        if name in block.parts:
            block.parts[name] = _reordered(block.parts[name], block.sizes[1], decoder.rotary.dims, arch.rotary)


def _reordered(rows: torch.Tensor, size: int, turned: int, order: str) -> torch.Tensor:
    heads = rows.unflatten(0, (-1, size))
    first, rest = heads[:, :turned], heads[:, turned:]
    shape = (2, turned // 2) if order == "pairs" else (turned // 2, 2)
    first = first.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, rest], 1).flatten(0, 1)


def _joined(block: _BlockTensors, arch: Arch) -> Tensors:
    """Return the tensors of a block as the architecture has them: fused, stacked, or apart."""
    parts = dict(block.parts)
    for part, wanted in (("attention", arch.fused), ("mlp", arch.stacked)):
        whole, *pieces = joined(part)
        for leaf in ("weight", "bias") if wanted else ():
            if f"{pieces[0]}.{leaf}" in parts:
                parts[f"{whole}.{leaf}"] = torch.cat([parts.pop(f"{piece}.{leaf}") for piece in pieces])
    return parts


def _rotation(decoder: Decoder, arch: Arch, size: int) -> Tensors:
    """Return the tensor that divides frequencies, if one is needed."""
    rotary = decoder.rotary
    if rotary is None:
        return {}
    if rotary.dims < size and not arch.partial:
        raise Unsaid(f"architecture {arch.name} turns whole heads, and this model {rotary.dims} of {size} channels")
    if rotary.scaling != 1:
        raise Unsaid("scales what it turns (by position embeddings of a kind that is not written here)")
    factors = rotary.factors
    if factors is None:
        return {}
    if not arch.factors:
        raise Unsaid(f"architecture {arch.name} has the frequencies of its base alone, and this model has others")
    return {"rope_freqs.weight": factors}


def _keys(
    decoder: Decoder, arch: Arch, blocks: list[_BlockTensors], whole: Tensors, sizes: tuple[int, int]
) -> dict[str, Any]:
    epsilon = "layer_norm_rms_epsilon" if arch.norm == "rms" else "layer_norm_epsilon"
    rows, hidden = whole["token_embd.weight"].shape
    keys: dict[str, Any] = {
        "vocab_size": rows,
        "context_length": _context_layout(decoder, arch),
        "embedding_length": hidden,
        "block_count": len(blocks),
        "feed_forward_length": _one_or_all([block.width for block in blocks]),
        "attention.head_count": _one_or_all([block.heads for block in blocks]),
        "attention.head_count_kv": _one_or_all([block.sizes[0] if block.sizes else 0 for block in blocks]),
        "attention.key_length": sizes[0],
        "attention.value_length": sizes[1],
        f"attention.{epsilon}": decoder.epsilon,
    }
    if decoder.rotary is not None:
        keys |= {"rope.dimension_count": decoder.rotary.dims, "rope.freq_base": decoder.rotary.base}
    for key, told in arch.keys.items():
        value = _value(decoder.config, told)
        if value is not None:
            keys[key] = value
    return keys


def _context_layout(decoder: Decoder, arch: Arch) -> int:
    """Return how many tokens a file may see: the model's window, where the architecture has no such windows."""
    kinds = list(getattr(decoder.config, "layer_types", None) or ())
    every = arch.window_every
    told = [(number + 1) % every == 0 for number in range(len(kinds))] if every else []
    if decoder.window is None or (kinds and told == [kind == "full_attention" for kind in kinds]):
        return decoder.context
    return min(decoder.context, decoder.window)


def _value(config: Any, told: Any) -> Any:
    """Return what an entry of the data stands for: the value of a config's field, or itself."""
    return getattr(config, told, None) if isinstance(told, str) else told


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers
