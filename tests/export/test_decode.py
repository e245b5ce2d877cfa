"""Programs with a cache generate, token by token, what their models generate."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import fxprune
from fxprune.errors import ExportError, UnknownNameError, VerificationError
from fxprune.export import model as decode
from fxprune.export.model import export_decoder
from fxprune.export.program import run_onnx
from fxprune.masking.compare import ROUGH
from tests import zoo
from tests.export.small import PAIRS, even, uneven
from tests.models import token_ids

Past = list[tuple[torch.Tensor, torch.Tensor]]
Step = Callable[[torch.Tensor, Past], tuple[torch.Tensor, Past]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return uneven("llama")


def check_generation(model: PreTrainedModel, step: Step, ids: torch.Tensor) -> None:
    """A program generates what its model does: the prompt goes in at once, then one token at a time."""
    model.generation_config.eos_token_id = None
    found, following, past = ids, ids, nothing(len(ids))
    for _ in range(8):
        logits, past = step(following, past)
        following = logits[:, -1:].argmax(-1)
        found = torch.cat([found, following], 1)
    assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))


def nothing(batch: int) -> Past:
    return [(torch.zeros(batch, pairs, 0, 8), torch.zeros(batch, pairs, 0, 8)) for pairs in PAIRS]


@pytest.mark.slow
def test_a_program_generates_with_its_cache(model: PreTrainedModel, tmp_path: Path) -> None:
    path = fxprune.export_model(model, tmp_path / "slim.pt2", cache=True)
    program = torch.export.load(path).module()

    def step(ids: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        out = program(input_ids=ids, past=past)
        return out["logits"], out["present"]

    for batch, tokens in ((1, 1), (3, 6)):
        check_generation(model, step, token_ids(batch, tokens))


@pytest.mark.slow
def test_an_onnx_model_generates_with_its_cache(model: PreTrainedModel, tmp_path: Path) -> None:
    path = fxprune.export_model(model, tmp_path / "slim.onnx", cache=True)
    session = onnxruntime.InferenceSession(path)
    shapes = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_key_values.1.key"] == ["batch", 2, "past", 8]
    assert shapes["present.3.value"][:2] == ["batch", 1]
    names = [entry.name for entry in session.get_inputs()]

    def step(ids: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        flat = [ids, *(tensor for pair in past for tensor in pair)]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True)}
        logits, *present = (torch.from_numpy(value) for value in session.run(None, feeds))
        return logits, list(zip(present[0::2], present[1::2], strict=True))

    ids = token_ids(2, 5)
    check_generation(model, step, ids)
    assert run_onnx(path, [ids, *(t for pair in nothing(2) for t in pair)])[0].shape == (2, 5, 131)


class Bounded(LlamaForCausalLM):
    """Takes no more than 64 tokens at once."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        torch._check(input_ids.shape[1] <= 64)
        return super().forward(input_ids, **given)


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_share_the_length_of_their_past(model: PreTrainedModel, tmp_path: Path, bounded: bool) -> None:
    kind = Bounded if bounded else LlamaForCausalLM
    path = export_decoder(kind(even("llama").config).eval(), tmp_path / "even.pt2")
    limits = torch.export.load(path).range_constraints
    assert bounded or sorted(limit.lower for limit in limits.values()) == [0, 1, 1]
    assert any(limit.upper == 64 for limit in limits.values()) == bounded


def test_a_program_that_differs_is_not_written(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(step: Any) -> Any:
        def run(**inputs: Any) -> dict[str, Any]:
            out = step(**inputs)
            return {**out, "logits": out["logits"] * (1 + 10 * ROUGH)}

        return SimpleNamespace(module=lambda: run)

    monkeypatch.setattr(decode, "_export_step", spoiled)
    with pytest.raises(VerificationError, match="the exported program differs"):
        export_decoder(model, tmp_path / "slim.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_keeps_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown suffix '\.bin'"):
        fxprune.export_model(even("llama"), tmp_path / "slim.bin", cache=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 20}
    recurrent = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(ExportError, match=r"cannot be exported|keeps no keys and values"):
        export_decoder(recurrent, tmp_path / "slim.pt2")


@pytest.mark.parametrize(
    ("family", "message"),
    [("recurrent_gemma", "keeps more between calls than keys and values"), ("jamba", "keys and values alone")],
)
def test_a_model_that_also_keeps_a_state_is_refused(family: str, message: str, tmp_path: Path) -> None:
    """Its program started each call with no state, and was compared with the same mistake."""
    model = zoo.tiny_model(family).train()
    with pytest.raises(ExportError, match=f"{message}.*cache=False"):
        export_decoder(model, tmp_path / "slim.pt2")
    assert model.training and list(tmp_path.iterdir()) == []
