"""Where a result goes: what may be replaced, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxprune
from fxprune.cli.config import is_file
from fxprune.cli.options import expanded
from fxprune.cli.output import check_output
from fxprune.errors import CheckpointError, FxpruneError
from tests.models import tiny


def test_a_tilde_is_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in `--out=~/slim`, and a file was then written into a folder called so."""
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded(Path("~/slim.gguf")) == Path("/home/me/slim.gguf") and expanded(None) is None


@pytest.mark.parametrize("name", ["slim", "slim-0.2", "model-3.2-1b", "v1.0", "slim.gguf", "new/slim", "new/a/b.pt2"])
def test_new_places_are_fine(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, "owner/model", force=False)
    assert list(tmp_path.iterdir()) == []
    assert is_file(Path(name)) == (Path(name).suffix in (".gguf", ".pt2"))


@pytest.mark.parametrize("mark", ["fxprune.json", "run.yaml"])
def test_a_folder_of_an_earlier_run_is_fine(tmp_path: Path, mark: str) -> None:
    (tmp_path / "slim").mkdir()
    check_output(tmp_path / "slim", "model", force=False)
    (tmp_path / "slim/notes").write_text("mine")
    with pytest.raises(CheckpointError, match="no earlier run wrote"):
        check_output(tmp_path / "slim", "model", force=False)
    check_output(tmp_path / "slim", "model", force=True)
    if mark == "fxprune.json":
        (tmp_path / "slim" / mark).write_text("")
        with pytest.raises(CheckpointError, match=r"an earlier checkpoint whose fxprune\.json cannot be read"):
            check_output(tmp_path / "slim", "model", force=False)
        fxprune.save_pretrained(tiny("llama", num_hidden_layers=1), tmp_path / "slim", force=True)
    else:
        (tmp_path / "slim" / mark).write_text("")
    check_output(tmp_path / "slim", "model", force=False)


def test_a_file_of_an_earlier_run_is_fine(tmp_path: Path) -> None:
    (tmp_path / "slim.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="--force"):
        check_output(tmp_path / "slim.gguf", "model", force=False)
    check_output(tmp_path / "slim.gguf", "model", force=True)
    (tmp_path / "slim.run.yaml").write_text("")
    check_output(tmp_path / "slim.gguf", "model", force=False)


def test_the_model_itself_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in (Path("model"), Path("./model/"), tmp_path / "model"):
        with pytest.raises(FxpruneError, match="the model itself"):
            check_output(out, "model", force=True)
