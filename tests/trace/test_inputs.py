"""Example inputs, and copies of a model to run them on."""

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils import weight_norm

import fxprune
from fxprune.errors import TraceError
from fxprune.graph.compat import fake_mode
from fxprune.trace import inputs
from fxprune.trace.inputs import (
    alias_twin,
    default_inputs,
    dynamic_dims,
    fake_twin,
    forward_parameters,
    hooks_left_out,
    inputs_like,
    is_hugging_face,
    meta_twin,
    private_parameters,
    shifted_right,
    written_parameters,
)
from tests.architectures.library import LIBRARY
from tests.models import tiny, token_ids


def test_inputs_are_made_for_language_models_alone() -> None:
    model = tiny("llama", num_hidden_layers=1)
    assert is_hugging_face(model) and not is_hugging_face(nn.Linear(2, 2))
    made = default_inputs(model, None)
    assert list(made) == ["input_ids"] and made["input_ids"].shape == (2, 7) and made["input_ids"].dtype == torch.long
    given = {"x": torch.zeros(1)}
    assert default_inputs(model, given) == given
    with pytest.raises(TraceError, match=r"Linear.*example_inputs"):
        default_inputs(nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("t5", {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}),
        ("bart", {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}),
        ("whisper", {"input_features": (2, 7, 12), "decoder_input_ids": (2, 5)}),
        ("vit", {"pixel_values": (2, 3, 8, 8)}),
        ("wav2vec2", {"input_values": (2, 96)}),
        ("clip", {"input_ids": (2, 7), "pixel_values": (2, 3, 8, 8)}),
    ],
)
def test_inputs_have_the_sizes_of_the_config(name: str, wanted: dict[str, tuple[int, ...]]) -> None:
    model, _ = LIBRARY[name]()
    made = default_inputs(model, None)
    assert {name: tuple(value.shape) for name, value in made.items()} == wanted


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_reads_its_labels_one_place_later(name: str) -> None:
    model: Any = LIBRARY[name]()[0]
    assert shifted_right(model, torch.tensor([[4, 5, -100]])).tolist() == [[model.config.decoder_start_token_id, 4, 5]]
    base: Any = transformers.T5Model(model.config) if name == "t5" else model.model
    assert shifted_right(base, torch.tensor([[4, -100, 6]]))[0, 1:].tolist() == [4, 0]


WHISPER = ("whisper", {"input_features": torch.randn(1, 8, 12), "labels": torch.ones(1, 4, dtype=torch.long)})
PAIR = {"input_ids": [5, 6, 7, 8], "token_type_ids": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1], "text": "a pair"}


@pytest.mark.parametrize(
    ("name", "sample", "wanted"),
    [
        ("vit", {"pixel_values": torch.randn(3, 24, 24), "labels": 1}, {"pixel_values": (2, 3, 24, 24)}),
        ("wav2vec2", [{"input_values": torch.randn(1, 300)}], {"input_values": (2, 300)}),
        (*WHISPER, {"input_features": (2, 8, 12), "decoder_input_ids": (2, 5)}),
        ("bert", [PAIR], {"input_ids": (2, 4), "token_type_ids": (2, 4)}),
        ("bert", {"input_ids": torch.ones(4, 9), "token_type_ids": torch.ones(4, 9, dtype=torch.long)}, None),
        ("bert", torch.ones(4, 9, dtype=torch.long), None),
        ("bert", [PAIR | {"token_type_ids": [0] * 4}], None),
        ("llama", {"input_ids": [5, 6], "pixel_values": torch.randn(3, 8, 8)}, None),
    ],
)
def test_a_sample_of_other_inputs_than_the_config_tells_decides(name: str, sample: Any, wanted: Any) -> None:
    """Sounds of any other length were refused, and token types, or images beside a text, were left out silently."""
    model = tiny(name) if name == "llama" else LIBRARY[name]()[0]
    found = inputs_like(model, sample)
    assert found == wanted or {name: tuple(value.shape) for name, value in (found or {}).items()} == wanted


def test_images_beside_a_text_are_traced_one_sample_at_a_time() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    tower = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**sizes), vision_config=tower)
    sample = {"input_ids": torch.ones(2, 9, dtype=torch.long), "pixel_values": torch.randn(2, 3, 8, 8)}
    found = inputs_like(transformers.LlavaForConditionalGeneration(config), [sample])
    assert {name: len(value) for name, value in (found or {}).items()} == {"input_ids": 1, "pixel_values": 1}


def test_batch_and_sequence_may_vary_and_features_may_not() -> None:
    floats = {f"x{dims}": torch.zeros([3] * dims) for dims in (1, 2, 3, 4)}
    dims = dynamic_dims({**floats, "ids": torch.zeros(3, 3, 3, dtype=torch.long), "flag": True})
    free = {name: None if axes is None else list(axes) for name, axes in dims.items()}
    assert free == {"x1": [0], "x2": [0], "x3": [0, 1], "x4": [0], "ids": [0, 1], "flag": None}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_a_twin_on_meta_has_everything_but_storage() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model.append(nn.Linear(3, 4))
    model[3].weight = model[0].weight
    twin = meta_twin(model)
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert twin[0].weight.shape == (4, 3) and twin[3].weight is twin[0].weight  # type: ignore[index, union-attr]
    assert twin.training and not model[0].weight.is_meta


def test_a_twin_to_trace_has_another_dtype_and_is_in_evaluation_mode() -> None:
    model = net()
    twin = fake_twin(model, fake_mode(), torch.float32, torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in twin.buffers()} == {b.dtype for b in model.buffers()}
    assert not twin.training and model.training


def test_a_twin_to_run_has_the_weights_and_buffers_and_gradients_of_its_own() -> None:
    model = net()
    model.seen = [model(torch.ones(2, 3))]  # type: ignore[assignment]
    twin = alias_twin(model)
    assert torch.equal(twin.seen[0], model.seen[0]) and twin.seen[0].grad_fn is None  # type: ignore[index, union-attr]
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    twin(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in twin.parameters())


class WritesWhereValuesAsk(nn.Module):
    """Branches on values, which ``meta`` has none of, unless it is traced; and writes to one of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.read = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x) and bool(x.sum() < 0):
            return x
        with torch.no_grad():
            self.written.add_(1)
        return x * self.written * self.read


def test_parameters_are_written_to_where_code_branches_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of all weights was made for each run of a trace: masks of transformers branch on values on ``meta``."""
    assert written_parameters(WritesWhereValuesAsk(), {"x": torch.ones(3)}) == {"written"}
    assert written_parameters(tiny("llama"), {"input_ids": token_ids(2)}) == frozenset()
    assert private_parameters(WritesWhereValuesAsk(), {"x": torch.ones(3)}) == {"written", "read"}, "so few are copied"
    monkeypatch.setattr(inputs, "_FEW", 0)
    assert private_parameters(WritesWhereValuesAsk(), {"x": torch.ones(3)}) == {"written"}


def test_hooks_of_a_user_are_left_out_and_those_of_torch_are_not() -> None:
    calls: list[Any] = []
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU())
    model[1].register_forward_hook(lambda *args: calls.append(args))
    model.register_forward_pre_hook(lambda *args: calls.append(args))
    twin = alias_twin(model)
    weight, bias = model[0].weight, model[0].bias
    assert torch.allclose(twin(torch.ones(2, 3)), (torch.ones(2, 3) @ weight.T + bias).relu())  # type: ignore[operator]
    assert calls == [] and hooks_left_out(model) == ("the model", "1")
    model(torch.ones(2, 3))
    assert len(calls) == 2


def test_hooks_that_collect_outputs_of_parts_go_with_the_mark_that_they_are_there() -> None:
    """A copy of a model that had run kept the mark and lost the hooks, and then collected nothing."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 26}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(pixels, output_hidden_states=True).hidden_states
        found = alias_twin(alias_twin(model))(pixels, output_hidden_states=True).hidden_states
    assert len(found) == 3 and all(map(torch.equal, found, wanted))
    assert hooks_left_out(model) == ()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(self.up(x).relu()) * scale  # type: ignore[no-any-return]


class PassesOn(Plain):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)


class NamesOne(Plain):
    def forward(self, scale: float = 1.0, **kwargs: Any) -> torch.Tensor:
        return super().forward(scale=scale, **kwargs)


def undeclared(forward: Any) -> Any:
    return lambda *args, **kwargs: forward(*args, **kwargs)


class Decorated(Plain):
    forward = undeclared(Plain.forward)


@pytest.mark.parametrize("kind", [PassesOn, NamesOne, Decorated])
def test_a_forward_that_passes_its_arguments_on_runs_at_any_size(kind: type[Plain]) -> None:
    """Inputs among ``**kwargs`` had the traced sizes alone, and no order."""
    order = ["scale", "x"] if kind is NamesOne else ["x", "scale"]
    assert list(forward_parameters(kind())) == order
    traced = fxprune.trace(model := kind(), {"scale": 2.0, "x": torch.randn(2, 7, 4)})
    assert not traced.notes
    assert [node.name for node in traced.graph_module.graph.nodes if node.op == "placeholder"] == order
    x = torch.randn(3, 5, 4)
    assert torch.equal(traced.graph_module(x=x, scale=2.0), model(x=x, scale=2.0))


def test_a_language_model_whose_forward_is_inherited_through_keywords_runs_at_any_length() -> None:
    model = tiny("llama", num_hidden_layers=1)

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    traced = fxprune.trace(Own(model.config).eval())
    assert not traced.notes
    ids = token_ids(3, 11)
    with torch.no_grad():
        assert torch.allclose(traced.graph_module(ids)["logits"], traced.model(ids).logits, atol=1e-5)


def test_a_forward_bound_to_the_model_itself_is_refused() -> None:
    """The copy that is traced ran the weights of the model, which became constants of the graph."""
    model = Plain()
    model.forward = undeclared(model.forward)  # type: ignore[method-assign]
    with pytest.raises(TraceError, match=r"reads up.weight of the model itself.*Decorate forward in the class"):
        fxprune.trace(model, {"x": torch.randn(2, 7, 4)})


def test_attention_of_every_part_traces_to_plain_ops() -> None:
    """A part of a model may have an attention of its own, such as FlexAttention, which is no op."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config={**text, "vocab_size": 64}, vision_config=vision)
    config._attn_implementation = {"text_config": "flex_attention"}
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    assert model.config.text_config._attn_implementation == "flex_attention" != model.config._attn_implementation
    twin: Any = fake_twin(model, None, torch.float32, torch.float32)
    assert twin.config._attn_implementation == twin.config.text_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "flex_attention"


def test_large_experts_run_by_an_implementation_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ops copy a matrix for each token and expert: for 128 experts in 16 layers twice their bytes."""
    model = tiny("mixtral", num_hidden_layers=1)
    assert alias_twin(model).config._experts_implementation == "batched_mm"
    monkeypatch.setattr(sys.modules["fxprune.trace.inputs"], "_LARGE", 0)
    assert alias_twin(model).config._experts_implementation == model.config._experts_implementation != "batched_mm"
    assert fake_twin(model, fake_mode(), torch.float32, torch.float32).config._experts_implementation == "batched_mm"
    assert fxprune.trace(model).notes == ()
