"""Logits computed from GGUF tensors, and the architecture found by comparing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

from fxprune.errors import ExportError
from fxprune.export.gguf.format import candidate_archs, joined_names, names_in_format, place_of
from fxprune.export.gguf.layout import LAYOUTS, Contents, Decoder, InexpressibleError, lay_out
from fxprune.masking.compare import compare

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}


def gguf_logits(contents: Contents, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 logits ``(1, n, vocabulary)`` computed from the contents of a file, for tokens ``(1, n)``."""
    with torch.no_grad():
        return _ReferenceModel(contents).logits(tokens[0])[None]


def input_importance(contents: Contents, samples: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean square of each input of each matrix of a file, ``(inputs,)``, over samples of token ids ``(1, tokens)``.

    A matrix whose inputs are all zero, as those of a block without attention, has none; nor has any without samples.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def add(name: str, x: torch.Tensor) -> None:
        square = x.double().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + square if name in sums else square

    with torch.no_grad():
        model = _ReferenceModel(contents, add)
        for sample in samples:
            model.logits(sample[0])
            tokens += sample.shape[1]
    means = {name: total / tokens for name, total in sums.items()}
    # an input that is always zero has some importance, as there is none to divide by
    return {name: (mean + 1e-6 * mean.mean()).float() for name, mean in means.items() if mean.any()}


class _ReferenceModel:
    """The forward pass of a file. Each tensor is widened to float32 only when it is used, to save memory.

    ``see`` is called with the name of each matrix and its input.
    """

    def __init__(self, contents: Contents, see: Callable[[str, torch.Tensor], object] | None = None) -> None:
        self.arch, self.keys, self.tensors, self.see = contents.arch, contents.keys, contents.tensors, see

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tensors["token_embd.weight"][tokens.to(self.tensors["token_embd.weight"].device)].float().cpu()
        x = x * self.scale("embedding", x.shape[-1])
        if "position_embd.weight" in self.tensors:
            x = x + self.get("position_embd.weight")[: len(tokens)]
        x = self.norm(x, "token_embd_norm")
        for number in range(self.keys["block_count"]):
            x = self.block(x, number)
        x = self.norm(x, "output_norm")
        x = self.linear(x, "output" if "output.weight" in self.tensors else "token_embd")
        x = x * self.scale("output", 1)
        cap = self.keys.get("final_logit_softcapping")
        return x if not cap else cap * torch.tanh(x / cap)

    def scale(self, what: str, size: int) -> float:
        entry = self.arch.scales.get(what)
        if entry is None:
            return 1.0
        if entry == "sqrt":
            return float(size**0.5)
        inverse = entry.startswith("1/")
        value = self.keys.get(entry.removeprefix("1/"))
        return 1.0 if not value else float(1 / value if inverse else value)

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name].float().cpu()

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = f"{name}.bias"
        if self.see is not None:
            self.see(f"{name}.weight", x)
        return F.linear(x, self.get(f"{name}.weight"), self.get(bias) if bias in self.tensors else None)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.weight" not in self.tensors:
            return x
        weight, bias = self.get(f"{name}.weight"), f"{name}.bias"
        if self.arch.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], None, self.keys["attention.layer_norm_rms_epsilon"]) * weight
        made = F.layer_norm(x, x.shape[-1:], None, None, self.keys["attention.layer_norm_epsilon"]) * weight
        return made + self.get(bias) if bias in self.tensors else made

    def number(self, key: str, block: int) -> int:
        value = self.keys[key]
        return int(value[block] if isinstance(value, list) else value)

    def block(self, x: torch.Tensor, number: int) -> torch.Tensor:
        at, step = f"blk.{number}.", self.scale("residual", 1)
        if not self.number("attention.head_count", number):
            return x + step * self.mlp(self.norm(x, f"{at}ffn_norm"), at)
        normed = self.norm(x, f"{at}attn_norm")
        attended = self.norm(self.attention(normed, number), f"{at}post_attention_norm")
        if self.arch.parallel:
            own_norm = f"{at}ffn_norm.weight" in self.tensors
            return x + attended + self.mlp(self.norm(x, f"{at}ffn_norm") if own_norm else normed, at)
        x = x + step * attended
        return x + step * self.norm(self.mlp(self.norm(x, f"{at}ffn_norm"), at), f"{at}post_ffw_norm")

    def mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        act = _ACTIVATIONS[self.arch.activation]
        up = self.linear(x, f"{at}ffn_up")
        if f"{at}ffn_gate.weight" in self.tensors:
            up = act(self.linear(x, f"{at}ffn_gate")) * up
        elif self.arch.stacked:
            gate, up = up.chunk(2, -1)
            up = act(gate) * up
        else:
            up = act(up)
        return self.linear(up, f"{at}ffn_down")

    def attention(self, x: torch.Tensor, number: int) -> torch.Tensor:
        at = f"blk.{number}."
        heads, pairs = self.number("attention.head_count", number), self.number("attention.head_count_kv", number)
        key, value = self.keys["attention.key_length"], self.keys["attention.value_length"]
        whole, *pieces = joined_names("attention")
        if self.arch.fused:
            q, k, v = self.linear(x, f"{at}{whole}").split([heads * key, pairs * key, pairs * value], -1)
        else:
            q, k, v = (self.linear(x, f"{at}{name}") for name in pieces)
        q, k = (self.head_norm(t, f"{at}attn_{name}_norm", key) for t, name in ((q, "q"), (k, "k")))
        q, k = (self.rotate(t.unflatten(-1, (-1, key)), number).transpose(0, 1) for t in (q, k))
        v = v.unflatten(-1, (pairs, value)).transpose(0, 1)
        k, v = (t.repeat_interleave(heads // pairs, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * (self.keys.get("attention.scale") or key**-0.5)
        cap = self.keys.get("attn_logit_softcapping")
        scores = scores if not cap else cap * torch.tanh(scores / cap)
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return self.linear((weights @ v).transpose(0, 1).flatten(1), f"{at}attn_output")

    def head_norm(self, x: torch.Tensor, name: str, size: int) -> torch.Tensor:
        """Normalise queries or keys: each head, or all heads at once if the weight has their total size."""
        if f"{name}.weight" not in self.tensors:
            return x
        whole = self.tensors[f"{name}.weight"].shape[0] == x.shape[-1] and x.shape[-1] != size
        return self.norm(x, name) if whole else self.norm(x.unflatten(-1, (-1, size)), name).flatten(-2)

    def rotate(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Apply the rotary embedding to ``(n, heads, size)``."""
        dims = self.keys.get("rope.dimension_count", 0)
        every = self.arch.unturned_every
        if not dims or self.arch.rotary == "none" or (every and (number + 1) % every == 0):
            return x
        angles = self.keys["rope.freq_base"] ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
        if "rope_freqs.weight" in self.tensors:
            angles = angles / self.get("rope_freqs.weight").double()
        angles = (torch.arange(len(x), dtype=torch.float64)[:, None, None] * angles).float()
        first, rest = x[..., :dims], x[..., dims:]
        a, b = first.chunk(2, -1) if self.arch.rotary == "halves" else (first[..., 0::2], first[..., 1::2])
        parts = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        rotated = torch.cat(parts, -1) if self.arch.rotary == "halves" else torch.stack(parts, -1).flatten(-2)
        return torch.cat([rotated, rest], -1)


def find_contents(decoder: Decoder, tolerance: float) -> Contents:
    """Contents of a file with the same logits as a model, up to a ``tolerance`` relative to the largest logit.

    The architecture of the model's type is tried first, then those whose blocks may differ.

    Raises:
        ExportError: no architecture can express the model; with the reason of each.
    """
    model_type = str(getattr(decoder.config, "model_type", ""))
    whole, rotates = joined_names("attention")[0], decoder.rotary is not None
    reasons = []
    for arch in candidate_archs(model_type):
        reason = ""
        fused = any(whole in names_in_format(place_of(name)[1], arch) for name in decoder.tensors)
        for layout in LAYOUTS:
            # without fused tensors, or without rotation, layouts that differ only in these are the same
            if (not fused and layout.fused != LAYOUTS[0].fused) or (not rotates and layout.rotary != LAYOUTS[0].rotary):
                continue
            try:
                contents = lay_out(decoder, arch, layout)
            except InexpressibleError as error:
                reason = reason or str(error)
                break
            difference = compare([decoder.logits], [gguf_logits(contents, decoder.tokens)])
            if difference <= tolerance:
                return contents
            reason = reason or f"architecture {arch.name} computes something else, by {difference:.1e}"
        reasons.append(reason)
    what = f"the format cannot express this model: {'; '.join(dict.fromkeys(reasons))}"
    remedy, shell = (
        f"Prune to equal blocks with {how}, or export a .pt2 or .onnx file" for how in ("uniform=True", "--uniform")
    )
    raise ExportError(what, where=model_type, remedy=remedy, shell=shell)
