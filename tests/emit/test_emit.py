"""Slim tensors become models of the same class that compute the same as the masked dense model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import nn

from fxprune.emit import Blueprint, Emission, emit, rebuild

torch.set_num_threads(1)

HIDDEN, HEADS, KV, DIM, FFN, LAYERS, VOCAB = 48, 4, 2, 12, 56, 3, 101
Cuts = dict[str, dict[int, torch.Tensor]]
Members = dict[str, tuple[int, torch.Tensor]]
AttnCut = Callable[[list[int], list[int]], Members]


def rows(units: Iterable[int], width: int, offset: int = 0) -> torch.Tensor:
    """Indices of the given runs of ``width``."""
    return torch.tensor([offset + unit * width + i for unit in units for i in range(width)])


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one architecture and where its slices are."""

    make: Callable[[], hf.PreTrainedModel]
    layer: str
    mlp: Callable[[torch.Tensor], Members]
    attn: AttnCut | None = None
    kv: int = KV


def separate(q: str, k: str, v: str, o: str, bias: str = "", width: int = DIM) -> AttnCut:
    """Attention with one projection each; names in ``bias`` have one."""

    def cut(heads: list[int], kvs: list[int]) -> Members:
        found = {f"{q}.weight": (0, rows(heads, width)), f"{o}.weight": (1, rows(heads, width))}
        for name in (k, v):
            found[f"{name}.weight"] = (0, rows(kvs, width))
        for name, units in zip((q, k, v), (heads, kvs, kvs), strict=True):
            if bias:
                found[f"{name}.bias"] = (0, rows(units, width))
        return found

    return cut


def fused_columns(heads: list[int], _: list[int]) -> Members:
    """One (hidden, q | k | v) projection with its bias."""
    index = torch.cat([rows(heads, DIM, part * HIDDEN) for part in range(3)])
    return {
        "attn.c_attn.weight": (1, index),
        "attn.c_attn.bias": (0, index),
        "attn.c_proj.weight": (0, rows(heads, DIM)),
    }


def fused_rows(heads: list[int], kvs: list[int]) -> Members:
    """One (q | k | v, hidden) projection with fewer keys than queries."""
    start = HEADS * DIM
    index = torch.cat([rows(heads, DIM), rows(kvs, DIM, start), rows(kvs, DIM, start + KV * DIM)])
    return {"self_attn.qkv_proj.weight": (0, index), "self_attn.o_proj.weight": (1, rows(heads, DIM))}


def gated(index: torch.Tensor) -> Members:
    names = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}
    return {name: (axis, index) for name, axis in names.items()}


def plain(first: str, second: str, transposed: bool = False, bias: bool = True) -> Callable[[torch.Tensor], Members]:
    def cut(index: torch.Tensor) -> Members:
        found = {
            f"{first}.weight": (int(transposed), index),
            f"{second}.weight": (1 - int(transposed), index),
        }
        return {**found, f"{first}.bias": (0, index)} if bias else found

    return cut


def fused_gate(index: torch.Tensor) -> Members:
    return {
        "mlp.gate_up_proj.weight": (0, torch.cat([index, index + FFN])),
        "mlp.down_proj.weight": (1, index),
    }


def build(model: type[hf.PreTrainedModel], config: type[hf.PreTrainedConfig], **fields: object) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    made = model(config(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None, **fields)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return made


MODERN = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
}
SELF = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
OPT = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "yes")


def modern(name: str, **more: object) -> Callable[[], hf.PreTrainedModel]:
    classes = getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name.replace('ForText', '')}Config", None)
    config = classes[1] if name != "Gemma3" else hf.Gemma3TextConfig
    return lambda: build(classes[0], config, **{**MODERN, **more})


FAMILIES = {
    "llama": Family(modern("Llama", head_dim=DIM), "model.layers", gated, SELF),
    "gemma3": Family(
        modern(
            "Gemma3",
            head_dim=DIM,
            query_pre_attn_scalar=12,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "model.layers",
        gated,
        SELF,
    ),
    "phi3": Family(modern("Phi3"), "model.layers", fused_gate, fused_rows),
    "gpt2": Family(
        lambda: build(hf.GPT2LMHeadModel, hf.GPT2Config, n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_positions=64),
        "transformer.h",
        plain("mlp.c_fc", "mlp.c_proj", transposed=True),
        fused_columns,
        kv=HEADS,
    ),
    "opt": Family(
        modern("OPT", ffn_dim=FFN, word_embed_proj_dim=HIDDEN),
        "model.decoder.layers",
        plain("fc1", "fc2"),
        OPT,
        kv=HEADS,
    ),
    "bloom": Family(
        lambda: build(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=HIDDEN, n_head=HEADS, n_layer=LAYERS),
        "transformer.h",
        plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def slim_tensors(dense: nn.Module, cuts: Cuts, removed: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    gone, made = tuple(f"{path}." for path in removed), dict[int, torch.Tensor]()
    found = {}
    for name, tensor in all_tensors(dense).items():
        if gone and name.startswith(gone):
            continue
        slim = tensor
        for axis, keep in cuts.get(name, {}).items():
            slim = slim.detach().index_select(axis, keep)
        found[name] = made.setdefault(id(tensor), slim)
    return found


def masked(dense: hf.PreTrainedModel, cuts: Cuts, removed: Iterable[str] = ()) -> hf.PreTrainedModel:
    """The dense model with what is cut set to zero and the removed layers passing their input through."""
    twin = copy.deepcopy(dense)
    tensors = all_tensors(twin)
    with torch.no_grad():
        for name, axes in cuts.items():
            for axis, keep in axes.items():
                gone = torch.tensor(
                    [i for i in range(tensors[name].shape[axis]) if i not in set(keep.tolist())],
                    dtype=torch.long,
                )
                tensors[name].index_fill_(axis, gone, 0)
        for path in removed:
            for name, tensor in tensors.items():
                if name.startswith(f"{path}.") and tensor.is_floating_point():
                    tensor.zero_()
    return twin


def cuts_of(family: Family, members: Mapping[int, Members]) -> Cuts:
    return {
        f"{family.layer}.{layer}.{name}": {axis: index}
        for layer, found in members.items()
        for name, (axis, index) in found.items()
    }


def ffn_width(model: nn.Module, family: Family) -> int:
    """Channels of the dense MLP: some classes have four times the hidden width whatever they are told."""
    name, (axis, _) = next(iter(family.mlp(torch.tensor([0])).items()))
    size = all_tensors(model)[f"{family.layer}.0.{name}"].shape[axis]
    return size // 2 if family.mlp is fused_gate else size


def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 29).reshape(2, 13)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check(dense: hf.PreTrainedModel, cuts: Cuts, removed: tuple[str, ...] = ()) -> hf.PreTrainedModel:
    """Emits and compares with the masked dense model in every respect that users rely on."""
    before, config = copy.deepcopy(dense.state_dict()), dense.config.to_json_string()
    attributes = {path: dict(vars(module)) for path, module in dense.named_modules()}
    tensors = slim_tensors(dense, cuts, removed)
    want = logits(masked(dense, cuts, removed))
    emission = emit(dense, tensors, removed)
    assert emission.model is not None, emission.reasons
    slim = emission.model
    assert emission.reasons == () and type(slim) is type(dense)
    torch.testing.assert_close(logits(slim), want, rtol=0, atol=1e-4)
    held = all_tensors(slim)
    assert not any(tensor.is_meta for tensor in held.values())
    given = {tensor.data_ptr() for tensor in tensors.values()}
    assert {tensor.data_ptr() for tensor in held.values()} == given
    assert dense.config.to_json_string() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert {path: dict(vars(module)) for path, module in dense.named_modules()} == attributes
    generates(slim)
    return slim


def generates(slim: hf.PreTrainedModel) -> None:
    ids = torch.arange(5, 13).reshape(1, 8)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plainly = (slim.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plainly) and cached.shape == (1, 14)


def uneven(width: int, layer: int) -> torch.Tensor:
    return torch.arange(width)[torch.arange(width) % (3 + layer) != 1]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_mlp_channels_differ_by_layer(name: str) -> None:
    family = FAMILIES[name]
    dense = family.make()
    width = ffn_width(dense, family)
    cuts = cuts_of(family, {layer: family.mlp(uneven(width, layer)) for layer in (0, 2)})
    slim = check(dense, cuts)
    assert set(slim.fxprune_overrides.block_fields) <= {f"{family.layer}.{layer}" for layer in (0, 2)}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_whole_groups_differ_by_layer(name: str) -> None:
    family = FAMILIES[name]
    assert family.attn is not None
    groups = HEADS // family.kv
    keep = {0: [family.kv - 1], 1: list(range(family.kv - 1))}
    heads = {layer: [kv * groups + i for kv in kvs for i in range(groups)] for layer, kvs in keep.items()}
    check(family.make(), cuts_of(family, {layer: family.attn(heads[layer], keep[layer]) for layer in keep}))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_query_heads_within_groups(name: str) -> None:
    family = FAMILIES[name]
    assert family.attn is not None
    check(family.make(), cuts_of(family, {0: family.attn([0, 3], [0, 1]), 2: family.attn([1, 2], [0, 1])}))


@pytest.mark.parametrize("name", ["gemma3", "phi3", "gpt2", "opt"])
def test_a_layer_goes_and_the_rest_is_cut(name: str) -> None:
    family = FAMILIES[name]
    dense = family.make()
    width = ffn_width(dense, family)
    removed = (f"{family.layer}.1",)
    slim = check(dense, cuts_of(family, {2: family.mlp(uneven(width, 1))}), removed)
    assert len(slim.get_submodule(family.layer)) == LAYERS - 1
    assert slim.config.num_hidden_layers == LAYERS - 1
    ids = torch.arange(5, 13).reshape(1, 8)
    assert slim(ids, use_cache=True).logits.shape == (1, 8, VOCAB)


def hidden_cuts(dense: nn.Module, keep: torch.Tensor, skip: tuple[str, ...] = ()) -> Cuts:
    """Every axis of the residual width, in a model whose other widths differ from it."""
    return {
        name: {axis: keep for axis, size in enumerate(tensor.shape) if size == HIDDEN}
        for name, tensor in all_tensors(dense).items()
        if not name.endswith(skip)
    }


def emitted(emission: Emission) -> hf.PreTrainedModel:
    assert emission.model is not None, emission.reasons
    return emission.model


WIDE = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}


@pytest.mark.parametrize("kept", [40, 42])
def test_residual_channels_go_where_the_class_ties_them_to_heads(kept: int) -> None:
    """40 is a multiple of the heads and builds; 42 is refused by the constructor."""
    dense = FAMILIES["gpt2"].make()
    keep = torch.arange(kept)
    cuts = hidden_cuts(dense, keep, ("c_proj.weight", "c_proj.bias"))
    for layer in range(LAYERS):
        for name in ("attn.c_proj", "mlp.c_proj"):
            cuts[f"transformer.h.{layer}.{name}.weight"] = {1: keep}
            cuts[f"transformer.h.{layer}.{name}.bias"] = {0: keep}
    slim = emitted(emit(dense, slim_tensors(dense, cuts)))
    attention = slim.transformer.h[1].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (HEADS, DIM, HIDDEN)
    assert slim.config.n_embd == kept and slim.transformer.ln_f.normalized_shape == (kept,)
    assert attention.c_proj.nf == kept and attention.scaling == DIM**-0.5
    generates(slim)


def test_tied_embedding_scale_and_requires_grad_survive() -> None:
    dense = modern("Gemma3", **WIDE, layer_types=["full_attention"] * LAYERS)()
    dense.model.norm.weight.requires_grad_(False)
    tensors = slim_tensors(dense, hidden_cuts(dense, torch.arange(0, HIDDEN, 2)))
    slim = emitted(emit(dense, tensors))
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    assert slim.model.embed_tokens.scalar_embed_scale == dense.model.embed_tokens.scalar_embed_scale
    assert not slim.model.norm.weight.requires_grad and slim.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_rotary_pairs_go_everywhere_and_the_scale_stays(name: str) -> None:
    """Scores shrink to the kept pairs; the scale must stay that of the dense head."""
    family = FAMILIES[name]
    dense = family.make()
    half = torch.tensor([0, 2, 3, 5])
    pairs = torch.cat([half, half + DIM // 2])
    unit = lambda count, offset=0: torch.cat([offset + head * DIM + pairs for head in range(count)])  # noqa: E731
    cuts: Cuts = {f"model.rotary_emb.{buffer}": {0: half} for buffer in ("inv_freq", "original_inv_freq")}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.self_attn"
        cuts[f"{block}.o_proj.weight"] = {1: unit(HEADS)}
        if name == "phi3":
            start = HEADS * DIM
            parts = [unit(HEADS), unit(KV, start), unit(KV, start + KV * DIM)]
            cuts[f"{block}.qkv_proj.weight"] = {0: torch.cat(parts)}
            continue
        cuts |= {f"{block}.q_proj.weight": {0: unit(HEADS)}}
        cuts |= {f"{block}.{part}_proj.weight": {0: unit(KV)} for part in "kv"}
    slim = emitted(emit(dense, slim_tensors(dense, cuts)))
    assert slim.config.head_dim == 8 and slim.fxprune_overrides.block_fields == {}
    assert slim.model.layers[1].self_attn.scaling == DIM**-0.5
    assert torch.isfinite(logits(slim)).all()
    torch.testing.assert_close(logits(slim), logits(masked(dense, cuts)), rtol=0, atol=1e-4)
    generates(slim)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_blueprint_rebuilds_the_structure_from_the_dense_config(name: str) -> None:
    family = FAMILIES[name]
    dense = family.make()
    members = {0: family.mlp(uneven(ffn_width(dense, family), 0))}
    if family.attn:
        members[2] = family.attn([2, 3], [1] if family.kv == KV else [2, 3])
    slim = check(dense, cuts_of(family, members), (f"{family.layer}.1",))
    blueprint = Blueprint.from_dict(json.loads(json.dumps(slim.fxprune_blueprint)))
    with torch.device("meta"):
        blank = type(dense)(copy.deepcopy(dense.config))
    again = rebuild(blank, blueprint)
    for path, tensor in all_tensors(slim).items():
        owner, _, leaf = path.rpartition(".")
        kind = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        getattr(again.get_submodule(owner), kind)[leaf] = tensor
    torch.testing.assert_close(logits(again.eval()), logits(slim))


def test_the_caller_decides_between_assignments_of_the_same_shapes() -> None:
    """Half of each head's channels, or half of the heads: the shapes are the same, the model is not."""
    family = FAMILIES["opt"]
    dense = family.make()
    assert family.attn is not None
    cuts = cuts_of(family, {0: family.attn([0, 1], [0, 1])})
    tensors, seen = slim_tensors(dense, cuts), []

    def agrees(model: hf.PreTrainedModel) -> bool:
        attention = model.model.decoder.layers[0].self_attn
        seen.append((attention.num_heads, attention.head_dim))
        return attention.num_heads == HEADS

    slim = emitted(emit(dense, tensors, agrees=agrees))
    assert seen[0] == (2, DIM) and seen[-1] == (HEADS, DIM // 2)
    assert slim.model.decoder.layers[0].self_attn.scaling == DIM**-0.5


def test_what_no_assignment_reaches_is_refused_with_names_and_shapes() -> None:
    """A value width of its own: no field sets it, and the view of all heads in one shape fails."""
    dense = FAMILIES["llama"].make()
    keep = torch.cat([torch.arange(7) + head * DIM for head in range(KV)])
    cuts: Cuts = {"model.layers.1.self_attn.v_proj.weight": {0: keep}}
    emission = emit(dense, slim_tensors(dense, cuts))
    assert emission.model is None
    assert "block model.layers.1: self_attn.v_proj.weight: wanted (14, 48), obtained (24, 48)" in emission.reasons


def test_a_caller_who_never_agrees_gets_reasons() -> None:
    family = FAMILIES["llama"]
    dense = family.make()
    emission = emit(dense, slim_tensors(dense, cuts_of(family, {0: SELF([0, 1], [0])})), agrees=lambda _: False)
    assert emission.model is None and any("computes something else" in reason for reason in emission.reasons)


def test_requests_that_make_no_sense_are_refused() -> None:
    dense = FAMILIES["llama"].make()
    tensors = all_tensors(dense)
    assert "model.layers.9" in emit(dense, tensors, ("model.layers.9",)).reasons[0]
    assert "every block" in emit(dense, {}, tuple(f"model.layers.{i}" for i in range(LAYERS))).reasons[0]
    partial = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert emit(dense, partial).reasons == ("lm_head.weight: no tensor given for it",)
