"""A model and its checkpoint compute the same, or the difference is named: when it is saved, and when it is loaded."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from fxprune.checkpoint.manifest import MANIFEST, Forward, _move, read_manifest, run_forward
from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.write import save_pretrained
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal
from tests.architectures.library import LIBRARY, stirred
from tests.checkpoint.small import edit
from tests.models import token_ids


def put(path: str, name: str, value: Any) -> Callable[[nn.Module], object]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def hook(path: str, function: Callable[..., Any]) -> Callable[[nn.Module], object]:
    return lambda model: model.get_submodule(path).register_forward_hook(function)


MLP = "model.layers.0.mlp"
CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "activation": (put(MLP, "act_fn", nn.ReLU()), f"{MLP}.act_fn is ReLU, where a loader builds SiLU"),
    "module that computes the same": (put(MLP, "act_fn", nn.SiLU()), f"{MLP}.act_fn is SiLU, where a loader builds"),
    "forward of a module": (put(MLP, "forward", lambda x: x), f"outputs differ by .* {MLP} has a forward of its own"),
    "forward": (put("", "forward", lambda: None), "only the loaded one runs: TypeError.* the model has a forward"),
    "hook": (hook("model.norm", lambda _, args, output: output * 2), r"outputs differ by .* model\.norm has hooks"),
    "another shape": (hook("lm_head", lambda _, args, output: output[..., :7]), r"its outputs are \[2, 6, 7\]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_checkpoint_does_not_hold_is_named(change: str, slim: Any, tmp_path: Path) -> None:
    """It was saved without it, and nobody said so."""
    model = copy.deepcopy(slim)
    apply, words = CHANGES[change]
    apply(model)
    with pytest.raises(CheckpointError, match=words) as caught:
        save_pretrained(model, tmp_path / "slim")
    assert "verify=False" in str(caught.value) and list(tmp_path.iterdir()) == []
    save_pretrained(model, tmp_path / "slim", verify=False)
    assert read_manifest(tmp_path / "slim").forward is None
    assert from_pretrained(tmp_path / "slim", verify=True) is not None


def test_what_changes_no_output_is_saved(slim: Any, tmp_path: Path) -> None:
    """A hook that watches, an attribute that the config section can hold, and a model in training."""
    model, seen = copy.deepcopy(slim).train(), list[int]()
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    model.model.norm.variance_epsilon = 1e-2
    before = (torch.random.get_rng_state(), random.getstate())
    save_pretrained(model, tmp_path / "slim")
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert model.training and seen == [1] and model.config.use_cache
    assert from_pretrained(tmp_path / "slim", verify=True).model.norm.variance_epsilon == 1e-2


def test_a_model_that_writes_to_itself_is_as_it_was() -> None:
    """A class changes its attention for good when it first sees a short text."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 26, "num_hidden_layers": 1}
    model: Any = hf.BigBirdForCausalLM(hf.BigBirdConfig(vocab_size=31, is_decoder=True, **sizes))
    before = type(model.bert.encoder.layer[0].attention.self)
    assert isinstance(run_forward(model), Forward)
    assert type(model.bert.encoder.layer[0].attention.self) is before


def test_another_computation_is_found_when_it_is_loaded(slim: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Code that changed since, as in another release of transformers."""
    save_pretrained(slim, tmp_path / "slim")
    record: Any = read_manifest(tmp_path / "slim").forward
    assert record["inputs"] == {"input_ids": {"shape": [2, 6], "below": 131}} and len(record["values"]) == 8
    kind = type(slim.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 1.5)
    from_pretrained(tmp_path / "slim", verify=False)
    for verify in (None, True):
        with pytest.raises(CheckpointError, match="computes something else than the one that was saved"):
            from_pretrained(tmp_path / "slim", verify=verify)
    from_pretrained(tmp_path / "slim", verify=True, dtype=torch.bfloat16)
    monkeypatch.setattr(kind, "forward", lambda self: None)
    with pytest.raises(CheckpointError, match="the loaded model does not run: TypeError"):
        from_pretrained(tmp_path / "slim", verify=True)


def test_half_precision_is_compared_to_its_rounding(slim: Any, tmp_path: Path) -> None:
    save_pretrained(copy.deepcopy(slim).bfloat16(), tmp_path / "slim")
    assert from_pretrained(tmp_path / "slim", verify=True).dtype == torch.bfloat16
    from_pretrained(tmp_path / "slim", verify=True, attn_implementation="eager")
    moved = [[value + 1 for value in row] for row in read_manifest(tmp_path / "slim").forward["values"]]  # type: ignore[index]
    edit(tmp_path / "slim" / MANIFEST, lambda data: data["forward"].update(values=moved))
    with pytest.raises(CheckpointError, match="computes something else"):
        from_pretrained(tmp_path / "slim", verify=True)


@pytest.mark.parametrize("name", ["t5", "bert", "vit", "resnet", "clip", "wav2vec2", "whisper"])
def test_inputs_are_guessed_for_other_kinds_of_models(name: str, tmp_path: Path) -> None:
    model: Any = stirred(LIBRARY[name]()[0])
    save_pretrained(model, tmp_path / name)
    record: Any = read_manifest(tmp_path / name).forward
    assert "values" in record and set(record["inputs"]) == set(LIBRARY[name]()[1])
    assert from_pretrained(tmp_path / name, verify=True) is not None


def test_a_model_whose_inputs_cannot_be_guessed_is_saved_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = stirred(LIBRARY["clip"]()[0])
    monkeypatch.setattr(type(model), "main_input_name", "waves")
    assert isinstance(run_forward(model), Refusal)
    save_pretrained(model, tmp_path / "clip")
    assert "inputs for it cannot be guessed" in read_manifest(tmp_path / "clip").forward["note"]  # type: ignore[index]
    assert from_pretrained(tmp_path / "clip", verify=True) is not None


def test_a_loaded_model_takes_the_parameters_and_keeps_its_buffers(slim: Any) -> None:
    """On another device there is no second copy of the weights."""
    loaded = type(slim)(slim.config).eval()
    _move(loaded, slim, torch.device("cpu"))
    assert [id(p) for p in loaded.parameters()] == [id(p) for p in slim.parameters()]
    assert not {id(b) for b in loaded.buffers()} & {id(b) for b in slim.buffers()}
    first, second = run_forward(slim), run_forward(loaded)
    assert isinstance(first, Forward) and isinstance(second, Forward) and torch.equal(first.output, second.output)


def test_modes_of_the_caller_play_no_part(slim: Any, tmp_path: Path) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        save_pretrained(slim, tmp_path / "slim")
    again: Any = from_pretrained(tmp_path / "slim", verify=True)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, slim(token_ids()).logits)
