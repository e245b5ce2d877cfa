"""Uploads to a hub, for which a stand-in takes the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import fxprune
from fxprune.checkpoint import write
from fxprune.checkpoint.write import check_repository, push_folder
from fxprune.data.samples import FileSamples
from fxprune.errors import CheckpointError
from tests.models import tiny, token_ids


class StandIn:
    """Takes what is uploaded, in place of a hub."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.cards: dict[str, Any] = {}
        self.private: dict[str, bool | None] = {}

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
        """Make a repository."""
        if name.startswith("other/"):
            raise PermissionError("403 Forbidden")
        assert exist_ok
        self.private[name] = private
        return f"{self.endpoint}/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        """Take the files of a folder."""
        assert "fxprune" in commit_message
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        self.cards[repo_id] = ModelCard.load(Path(folder_path) / "README.md").data.to_dict()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The hub."""
    taken = StandIn()
    monkeypatch.setattr(write, "HfApi", lambda: taken)
    return taken


def test_a_result_is_uploaded_with_its_plan_report_and_card(taken: StandIn, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    model.config._name_or_path = "owner/dense"
    samples = FileSamples(token_ids(10, 9), "c4")
    options: dict[str, Any] = {"importance": "wanda", "recipe": "llm-pruner", "ratio": 0.1, "protect": (0, 0)}
    result = fxprune.prune(model, samples, **options)
    assert result.push_to_hub("owner/slim", private=True) == "https://hub.example/owner/slim"
    names = {"README.md", "config.json", "fxprune.json", "model.safetensors", "plan.json", "report.json", "report.html"}
    assert names <= set(taken.files["owner/slim"]) and taken.private == {"owner/slim": True}
    card = taken.cards["owner/slim"]
    assert (card["base_model"], card["pipeline_tag"], card["datasets"]) == (
        "owner/dense",
        "text-generation",
        ["allenai/c4"],
    )
    assert "license" not in card, "which is not known"
    with pytest.raises(CheckpointError, match=r"hub.example did not take it: PermissionError: 403.*hf auth login"):
        result.push_to_hub("other/slim")


def test_wrong_names_and_folders_are_refused(taken: StandIn, tmp_path: Path) -> None:
    for name in ("slim", "a/b/c", "owner/..", "owner/a b", 3):
        with pytest.raises(CheckpointError, match="is no id of a repository"):
            check_repository("repository", name)
    with pytest.raises(CheckpointError, match="no such folder"):
        push_folder(tmp_path / "none", "owner/name")
    assert taken.files == {} and taken.private == {}
