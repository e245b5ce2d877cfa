"""Emission from tensors cut by hand, whole blocks that go, and refusals with their reasons."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
import fxprune.emit.emitter as emitter
from fxprune.emit.emitter import Blueprint, Emission, emit, rebuild
from fxprune.emit.snapshot import build_on_meta
from fxprune.emit.structure import combined_inputs, describe_structure
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError
from fxprune.modelling.table_rows import INPUTS, select_inputs
from tests.emit.small import SmallModel, small
from tests.emitted import cut, distance, greedy, logits, padding_error, through_disk
from tests.models import all_tensors, tiny, token_ids
from tests.tiers import SLOW


def narrow(model: SmallModel, width: int = 8) -> dict[str, torch.Tensor]:
    """Tensors of a model whose second block has fewer channels."""
    tensors = all_tensors(model)
    tensors["blocks.1.up.weight"] = tensors["blocks.1.up.weight"].detach()[:width]
    tensors["blocks.1.up.bias"] = tensors["blocks.1.up.bias"].detach()[:width]
    tensors["blocks.1.down.weight"] = tensors["blocks.1.down.weight"].detach()[:, :width]
    return tensors


def test_modules_that_the_user_added_are_a_reason() -> None:
    class Stubborn:
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copy of me")

    model = small()
    model.probe = nn.Identity()
    emission = emitter.emit(model, all_tensors(model))
    assert emission.model is None and "probe: the class builds no such module" in emission.reasons
    model = small()
    model.stubborn = Stubborn()
    assert emitter.emit(model, all_tensors(model)).model is not None, "no copy is needed"
    emission = emitter.emit(model, all_tensors(model), inputs={})
    why = "the dense model cannot be copied: RuntimeError: no copy of me"
    assert emission.reasons == (f"a candidate does not run: {why}",)


def test_what_a_constructor_or_the_caller_raises_is_a_reason() -> None:
    class Demanding(SmallModel):
        def __init__(self, config: Any, other: int) -> None:
            super().__init__(config)

    model = Demanding(small().config, 1)
    emission = emitter.emit(model, narrow(model))
    assert emission.model is None and emission.reasons

    def refuse(_: nn.Module) -> bool:
        raise RuntimeError("not on this machine")

    model = small()
    emission = emitter.emit(model, narrow(model), agrees=refuse)
    assert "a candidate does not run: RuntimeError: not on this machine" in emission.reasons


@pytest.mark.parametrize("place", ["rebuild", "assign_tensors", "find_layout"])
def test_a_defect_of_ours_is_raised(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "fxprune.emit.somewhere"}
    exec("def broken(*args, **kwargs): return None + 1", space)
    monkeypatch.setattr(emitter, place, space["broken"])
    model = small()
    with pytest.raises(TypeError, match="NoneType"):
        emitter.emit(model, narrow(model))


def test_a_block_lacks_what_is_absent_and_is_built_where_its_kind_is() -> None:
    blueprint = Blueprint(fields={"head_dim": 2}, absent={"blocks.1": ["head_dim"]}, block_fields={"blocks.1": {}})
    assert [block.head_dim for block in rebuild(small(depth=2), blueprint).blocks] == [2, 4]
    blueprint = Blueprint(built_at={"blocks.1": {"index": 3, "fields": {"depth": 4}}})
    slim = rebuild(small(depth=2), blueprint)
    assert isinstance(slim.blocks[1].up, nn.Identity) and slim.blocks[1].layer_idx == 1
    assert vars(slim.blocks[1])[BUILT_AT]["index"] == 3 and slim.config.depth == 2
    with pytest.raises(CannotBuildError, match="norm"):
        rebuild(small(), Blueprint(block_fields={"norm": {"inner": 4}}))


HIDDEN, HEADS, KV, DIM, FFN, LAYERS = 48, 4, 2, 12, 88, 3
Cuts = dict[str, dict[int, torch.Tensor]]

GROUPED = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
CHANGES: dict[str, dict[str, Any]] = {"llama": GROUPED, "phi3": GROUPED, "gpt2": {"n_inner": None}}


def build(family: str) -> Any:
    return tiny(family, **CHANGES.get(family, {}))


def rows(units: Iterable[int], width: int, offset: int = 0) -> torch.Tensor:
    """Indices of the given runs of ``width``."""
    return torch.tensor([offset + unit * width + i for unit in units for i in range(width)])


def heads_cut(block: str, heads: list[int], kvs: list[int]) -> Cuts:
    """Attention with one projection each, without biases."""
    parts = {"q_proj": (0, heads), "k_proj": (0, kvs), "v_proj": (0, kvs), "o_proj": (1, heads)}
    return {f"{block}.self_attn.{name}.weight": {axis: rows(units, DIM)} for name, (axis, units) in parts.items()}


def slim_tensors(dense: nn.Module, cuts: Cuts, removed: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    made: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in all_tensors(dense).items():
        if not name.startswith(tuple(f"{path}." for path in removed)):
            slim = tensor
            for axis, keep in cuts.get(name, {}).items():
                slim = slim.detach().index_select(axis, keep)
            found[name] = made.setdefault(id(tensor), slim)
    return found


def masked(dense: Any, cuts: Cuts, removed: tuple[str, ...] = ()) -> Any:
    """The dense model with what is cut set to zero and the removed layers passing their input through."""
    twin = copy.deepcopy(dense)
    tensors = all_tensors(twin)
    with torch.no_grad():
        for name, axes in cuts.items():
            for axis, keep in axes.items():
                gone = sorted(set(range(tensors[name].shape[axis])) - set(keep.tolist()))
                tensors[name].index_fill_(axis, torch.tensor(gone), 0)
        for name, tensor in tensors.items():
            if name.startswith(tuple(f"{path}." for path in removed)) and tensor.is_floating_point():
                tensor.zero_()
    return twin


def emitted(emission: Emission) -> Any:
    assert emission.model is not None, emission.reasons
    return emission.model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_emitted_and_its_blueprint_rebuilds_it_from_the_dense_config(family: str) -> None:
    """A layer goes, one loses channels and one heads; the dense model stays as it is."""
    dense = build(family)
    keep, stack = torch.arange(FFN)[torch.arange(FFN) % 3 != 1], "model.layers"
    if family == "llama":
        cuts = heads_cut(f"{stack}.2", [2, 3], [1])
        for name, axis in {"gate": 0, "up": 0, "down": 1}.items():
            cuts[f"{stack}.0.mlp.{name}_proj.weight"] = {axis: keep}
    else:
        stack = "transformer.h"
        index = torch.cat([rows([2, 3], DIM, part * HIDDEN) for part in range(3)])
        cuts = {f"{stack}.2.attn.c_attn.weight": {1: index}, f"{stack}.2.attn.c_attn.bias": {0: index}}
        cuts |= {f"{stack}.2.attn.c_proj.weight": {0: rows([2, 3], DIM)}, f"{stack}.0.mlp.c_fc.weight": {1: keep}}
        cuts |= {f"{stack}.0.mlp.c_fc.bias": {0: keep}, f"{stack}.0.mlp.c_proj.weight": {0: keep}}
    before, config = copy.deepcopy(dense.state_dict()), dense.config.to_json_string()
    attributes = {path: dict(vars(module)) for path, module in dense.named_modules()}
    removed = (f"{stack}.1",)
    tensors = slim_tensors(dense, cuts, removed)
    known = dict[object, Any]()
    slim = emitted(emit(dense, tensors, removed, known=known))
    assert isinstance(slim, type(dense)) and slim.config.num_hidden_layers == LAYERS - 1
    torch.testing.assert_close(logits(slim), logits(masked(dense, cuts, removed)), rtol=0, atol=1e-4)
    assert {t.data_ptr() for t in all_tensors(slim).values()} == {t.data_ptr() for t in tensors.values()}
    assert dense.config.to_json_string() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert {path: dict(vars(module)) for path, module in dense.named_modules()} == attributes
    assert torch.equal(greedy(slim), greedy(slim, use_cache=False))
    with torch.device("meta"):
        again = rebuild(type(dense)(copy.deepcopy(dense.config)), known["fitted"][1].blueprint)
    for path, tensor in all_tensors(slim).items():
        owner, _, leaf = path.rpartition(".")
        kind = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        getattr(again.get_submodule(owner), kind)[leaf] = tensor
    torch.testing.assert_close(logits(again.eval()), logits(slim))


def hidden_cuts(dense: nn.Module, keep: torch.Tensor, skip: tuple[str, ...] = ()) -> Cuts:
    """Every axis of the residual width, in a model whose other widths differ from it."""
    return {
        name: {axis: keep for axis, size in enumerate(tensor.shape) if size == HIDDEN}
        for name, tensor in all_tensors(dense).items()
        if not name.endswith(skip)
    }


@pytest.mark.parametrize("kept", [40, 42])
def test_residual_channels_go_where_the_class_ties_them_to_heads(kept: int) -> None:
    """40 is a multiple of the heads and builds; 42 is refused by the constructor."""
    dense, keep = build("gpt2"), torch.arange(kept)
    cuts = hidden_cuts(dense, keep, ("c_proj.weight", "c_proj.bias"))
    for block in (f"transformer.h.{layer}.{name}" for layer in range(LAYERS) for name in ("attn", "mlp")):
        cuts |= {f"{block}.c_proj.weight": {1: keep}, f"{block}.c_proj.bias": {0: keep}}
    slim = emitted(emit(dense, slim_tensors(dense, cuts)))
    attention = slim.transformer.h[1].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (HEADS, DIM, HIDDEN)
    assert slim.config.n_embd == kept and slim.transformer.ln_f.normalized_shape == (kept,)
    assert attention.c_proj.nf == kept and attention.scaling == DIM**-0.5
    assert torch.equal(greedy(slim), greedy(slim, use_cache=False))


def test_tied_embedding_scale_and_requires_grad_survive() -> None:
    dense: Any = tiny("gemma3_text")
    dense.model.norm.weight.requires_grad_(False)
    slim = emitted(emit(dense, slim_tensors(dense, hidden_cuts(dense, torch.arange(0, HIDDEN, 2)))))
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    assert slim.model.embed_tokens.scalar_embed_scale == dense.model.embed_tokens.scalar_embed_scale
    assert not slim.model.norm.weight.requires_grad and slim.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_rotary_pairs_go_everywhere_and_the_scale_stays(family: str) -> None:
    """Scores shrink to the kept pairs; the scale must stay that of the dense head."""
    dense = build(family)
    half = torch.tensor([0, 2, 3, 5])
    pairs = torch.cat([half, half + DIM // 2])
    unit = lambda count, offset=0: torch.cat([offset + head * DIM + pairs for head in range(count)])  # noqa: E731
    cuts: Cuts = {f"model.rotary_emb.{buffer}": {0: half} for buffer in ("inv_freq", "original_inv_freq")}
    for block in (f"model.layers.{layer}.self_attn" for layer in range(LAYERS)):
        cuts[f"{block}.o_proj.weight"] = {1: unit(HEADS)}
        if family == "phi3":
            parts = [unit(HEADS), unit(KV, HEADS * DIM), unit(KV, (HEADS + KV) * DIM)]
            cuts[f"{block}.qkv_proj.weight"] = {0: torch.cat(parts)}
        else:
            cuts |= {f"{block}.{part}_proj.weight": {0: unit(HEADS if part == "q" else KV)} for part in "qkv"}
    slim = emitted(emit(dense, slim_tensors(dense, cuts)))
    assert slim.config.head_dim == 8 and slim.fxprune_overrides.block_fields == {}
    assert slim.model.layers[1].self_attn.scaling == DIM**-0.5
    torch.testing.assert_close(logits(slim), logits(masked(dense, cuts)), rtol=0, atol=1e-4)
    assert torch.equal(greedy(slim), greedy(slim, use_cache=False))


def test_the_caller_decides_between_assignments_of_the_same_shapes() -> None:
    """Half of each head's channels, or half of the heads: the shapes are the same, the model is not."""
    dense, seen, keep = build("opt"), list[tuple[int, int]](), rows([0, 1], DIM)
    block = "model.decoder.layers.0.self_attn"
    cuts: Cuts = {f"{block}.{name}_proj.{kind}": {0: keep} for name in "qkv" for kind in ("weight", "bias")}
    cuts[f"{block}.out_proj.weight"] = {1: keep}

    def agrees(model: Any) -> bool:
        attention = model.model.decoder.layers[0].self_attn
        seen.append((attention.num_heads, attention.head_dim))
        return bool(attention.num_heads == HEADS)

    slim = emitted(emit(dense, slim_tensors(dense, cuts), agrees=agrees))
    assert seen[0] == (2, DIM) and seen[-1] == (HEADS, DIM // 2)
    assert slim.model.decoder.layers[0].self_attn.scaling == DIM**-0.5


def test_what_one_emission_finds_out_serves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune emits up to three times: as it selects, without and with storage, and in the end."""
    dense, known = build("llama"), dict[object, Any]()
    tensors = slim_tensors(dense, heads_cut("model.layers.1", [0, 1], [0]))
    first = emitted(emit(dense, tensors, known=known))
    built = list[Any]()

    def counted(build: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(build)
        return build_on_meta(build, *args, **kwargs)

    monkeypatch.setattr("fxprune.emit.layout.build_on_meta", counted)
    second = emitted(emit(dense, tensors, known=known))
    assert describe_structure(second) == describe_structure(first)
    assert second.config.to_dict() == first.config.to_dict()
    few = len(built)
    emitted(emit(dense, tensors))
    assert few < 5 and len(built) - few > 20


def test_fields_that_reach_only_a_part_take_their_companions_along() -> None:
    """Experts that differ from the one beside them are set by hand; fewer heads still mean as many key/value heads."""
    fields = {"q_lora_rank": None, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "moe_intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "first_k_dense_replace": 0}
    dense = tiny("deepseek_v3", **sizes, **heads, **fields, **experts)
    kept, wide = [0, 1, 3], range(32)
    cuts = {
        "self_attn.q_proj.weight": {0: rows(kept, 24)},
        "self_attn.kv_b_proj.weight": {0: rows(kept, 32)},
        "self_attn.o_proj.weight": {1: rows(kept, 16)},
        "mlp.experts.gate_up_proj": {1: torch.tensor([*wide, *(40 + i for i in wide)])},
        "mlp.experts.down_proj": {2: torch.tensor(list(wide))},
    }
    slim = emitted(emit(dense, slim_tensors(dense, {f"model.layers.0.{name}": cut for name, cut in cuts.items()})))
    attention = slim.model.layers[0].self_attn
    assert (attention.num_heads, attention.num_key_value_groups) == (3, 1)


def test_requests_that_cannot_be_met_are_refused_with_names_and_shapes() -> None:
    """A value width of its own: no field sets it, and the view of all heads in one shape fails."""
    dense = build("llama")
    tensors = all_tensors(dense)
    keep = torch.cat([torch.arange(7) + head * DIM for head in range(KV)])
    emission = emit(dense, slim_tensors(dense, {"model.layers.1.self_attn.v_proj.weight": {0: keep}}))
    assert emission.model is None
    assert "block model.layers.1: self_attn.v_proj.weight: wanted (14, 48), obtained (24, 48)" in emission.reasons
    emission = emit(dense, slim_tensors(dense, heads_cut("model.layers.0", [0, 1], [0])), agrees=lambda _: False)
    assert emission.model is None and any("computes something else" in reason for reason in emission.reasons)
    assert "model.layers.9" in emit(dense, tensors, ("model.layers.9",)).reasons[0]
    assert "every block" in emit(dense, {}, tuple(f"model.layers.{i}" for i in range(LAYERS))).reasons[0]
    del tensors["lm_head.weight"]
    assert emit(dense, tensors).reasons == ("lm_head.weight: no tensor given for it",)


def test_rows_of_rows_are_counted_in_the_first_table() -> None:
    module = nn.Sequential(nn.Bilinear(1, 1, 1))
    select_inputs(module[0], {"bias": {"axis": 1, "of": 6, "kept": [1, 2, 5]}})
    more = {"0": {"bias": {"axis": 1, "of": 3, "kept": [0, 2]}, "x": {"axis": 0, "of": 2, "kept": [1]}}}
    assert combined_inputs(module, more)["0"] == {
        "bias": {"axis": 1, "of": 6, "kept": [1, 5]},
        "x": {"axis": 0, "of": 2, "kept": [1]},
    }
    assert vars(module[0])[INPUTS]["bias"]["kept"] == [1, 2, 5], "the module itself stays as it is"


BIASED = [("falcon", {"alibi": True, "num_hidden_layers": 2}, 1), ("bloom", {}, 2), ("mpt", {}, 1)]


@pytest.mark.parametrize(
    ("family", "changes", "cuts"), [BIASED[0], *(pytest.param(*row, marks=SLOW) for row in BIASED[1:])]
)
def test_position_biases_stay_with_their_heads(family: str, changes: Mapping[str, Any], cuts: int) -> None:
    """A head is removed, and its bias with it; then another one, of the model that was read from disk."""
    model: Any = tiny(family, **changes)
    for seed, left in ((3, 3), (5, 2))[:cuts]:
        result = cut(model, ("head",), seed=seed, ranking="local", select="select-by-group-ratio{group_ratio=0.3}")
        assert isinstance(result.model, type(model)), result.report.model_reasons
        inputs = result.model.fxprune_overrides.inputs
        assert {len(entry["kept"]) for entries in inputs.values() for entry in entries.values()} == {left}
        assert distance(logits(result.model), logits(result)) < 1e-4
        assert padding_error(result.model) < 1e-4
        assert torch.equal(greedy(result.model), greedy(result.model, use_cache=False))
        read = through_disk(result)
        assert not read.stock
        assert torch.equal(logits(read.model), logits(result.model))
        model = read.model


def test_a_table_is_cut_once_whatever_the_batch() -> None:
    """A block that counts heads as well passes the table on; when both selected rows, some batches lost rows twice."""
    dense = tiny("bloom", n_layer=2)
    result = cut(dense, ("mlp", "head"), ranking="local", select="select-by-group-ratio{group_ratio=0.5}")
    assert result.model is not None, result.report.model_reasons
    assert all("self_attention" in path for path in result.model.fxprune_overrides.inputs)
    for batch in (1, 2, 3, 4, 8):
        ids = token_ids(batch, 9)
        assert distance(logits(result.model, ids), logits(result, ids)) < 1e-4
    again = rebuild(dense, Blueprint(inputs=result.model.fxprune_overrides.inputs))
    assert {path: vars(module).get(INPUTS) for path, module in again.named_modules()} == {
        path: vars(module).get(INPUTS) for path, module in result.model.named_modules()
    }


def without_layer(model: Any, layer: int) -> Any:
    gone = (f"model.layers.{layer}",)
    return emitted(emit(model, slim_tensors(model, {}, gone), gone))


def test_a_layer_keeps_its_kind_where_layers_before_it_go(tmp_path: Path) -> None:
    """Layer 0 has no experts, by its index. Layers 1 and 2 have some, also when they are the first two."""
    dense = tiny("qwen2_moe", num_hidden_layers=3)
    slim = without_layer(dense, 0)
    assert [type(layer.mlp) for layer in slim.model.layers] == [type(layer.mlp) for layer in dense.model.layers[1:]]
    place = vars(slim.model.layers[0])[BUILT_AT]
    assert (place["index"], place["fields"]["num_hidden_layers"]) == (1, 3)
    assert BUILT_AT not in vars(slim.model.layers[1])
    structure = fxprune.save_pretrained(slim, tmp_path / "slim")
    assert not structure.is_stock and structure.overrides.built_at == {"model.layers.0": place}
    read = fxprune.from_pretrained(tmp_path / "slim")
    assert [layer.self_attn.layer_idx for layer in read.model.layers] == [0, 1]
    assert distance(logits(read), logits(slim)) < 1e-5
    assert torch.equal(greedy(read), greedy(slim, use_cache=False))
    last = without_layer(read, 1)
    assert vars(last.model.layers[0])[BUILT_AT]["index"] == 1
    fxprune.save_pretrained(last, tmp_path / "last")
    assert distance(logits(fxprune.from_pretrained(tmp_path / "last")), logits(last)) < 1e-5
