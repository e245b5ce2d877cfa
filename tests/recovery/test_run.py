"""What recovery puts around a training: copies, restored models, folders of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.errors import RecoveryError, VerificationError
from fxprune.recovery.run import (
    checkpoint_folder,
    claim_folder,
    copy_for_training,
    last_checkpoint,
    restored_state,
    weight_sums,
)
from tests.models import tiny


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint written to its end."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    return path


def test_a_model_comes_back_as_it_was_whatever_happens() -> None:
    model = tiny("llama", num_hidden_layers=1)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    cache = model.config.use_cache
    with pytest.raises(KeyError), restored_state(model):
        model.train()
        model.requires_grad_(True)
        model.config.use_cache = not cache
        model.left_behind = 1
        raise KeyError
    assert not model.training and not hasattr(model, "left_behind") and model.config.use_cache == cache
    assert not frozen.requires_grad and list(model.parameters())[1].requires_grad
    copied, result = copy_for_training(model, None)
    assert copied is not model and result is None
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    with pytest.raises(VerificationError, match="names or shapes"), restored_state(copied):
        copied.model.norm.weight = nn.Parameter(torch.ones(2))


def test_a_folder_is_the_callers_or_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpoint_folder(tmp_path / "a" / "b") as path:
        assert path == tmp_path / "a" / "b"
    assert path.is_dir()
    with checkpoint_folder(None) as path:
        assert path.is_dir()
    assert not path.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecoveryError, match="several processes"), checkpoint_folder(None):
        pass


def test_a_folder_with_checkpoints_belongs_to_one_run(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    claim_folder(tmp_path, {"seed": 0, "data": "a"})
    claim_folder(tmp_path, {"seed": 1, "data": "a"})
    checkpoint(tmp_path, 3)
    claim_folder(tmp_path, {"seed": 1, "data": "a"})
    with pytest.raises(RecoveryError, match="another run: data differ"):
        claim_folder(tmp_path, {"seed": 1, "data": "b"})
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == newest, "the newest that is whole"


def test_a_fingerprint_tells_weights_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = weight_sums(model)
    assert weight_sums(model) == before
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert weight_sums(model) != before
