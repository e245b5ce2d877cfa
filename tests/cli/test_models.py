"""Models as a user names them, how a hub is asked, and where a result goes."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import fxprune
from fxprune.cli import models as found
from fxprune.cli.config import is_file
from fxprune.cli.console import set_output
from fxprune.cli.options import expanded
from fxprune.cli.output import check_output
from fxprune.errors import CheckpointError, FxpruneError
from fxprune.pipeline.arguments import as_path
from tests.cli.folders import save_tiny
from tests.export.small import tokenizer
from tests.models import tiny


def test_paths_never_go_to_a_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "check_hub", lambda name: asked.append(name))
    asked: list[str] = []
    (here / "models").mkdir()
    for name in ("owner/name", "name"):
        found.check_model(name)
    for name in ("models/name", "./name", "~/name", "/name", "name/", "a/b/c", "name.gguf", "two words"):
        with pytest.raises(FxpruneError, match="no such folder or file"):
            found.check_model(name)
    assert asked == ["owner/name", "name"]


def test_models_are_named_by_their_folders_unless_these_are_called_alike(tmp_path: Path) -> None:
    for place in ("dense", "slim", "other/slim"):
        save_tiny(tmp_path / place)
    dense, slim, other = (str(tmp_path / place) for place in ("dense", "slim", "other/slim"))
    assert found.check_models([dense, slim, dense]) == {"dense": dense, "slim": slim}
    assert found.check_models([slim, other]) == {slim: slim, other: other}


def test_a_quiet_command_shows_no_bar_of_another_package(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers shows one while it converts the tensors of a GGUF file."""
    fxprune.export_model(tiny("llama", num_hidden_layers=1), tmp_path / "dense.gguf", tokenizer=tokenizer())
    capfd.readouterr()
    set_output(quiet=True)
    try:
        found.load(str(tmp_path / "dense.gguf"))
    finally:
        set_output()
    assert capfd.readouterr() == ("", "")


def test_rows_are_read_with_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    """Its config was looked up on a hub, for the names of classes: a file has none."""
    path, rows = tmp_path / "dense.gguf", tmp_path / "rows.jsonl"
    fxprune.export_model(tiny("llama", num_hidden_layers=1), path, tokenizer=tokenizer())
    rows.write_text('{"text": "so it"}\n{"text": "and so on"}\n')
    samples, words = found.load_samples(str(rows), str(path))
    assert [sample["input_ids"].tolist()[0] for sample in samples] == words(["so it", "and so on"]).input_ids


def test_a_model_has_the_dtype_and_the_device_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, words = found.load_pair(str(tmp_path), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and words("red").input_ids == [1]
    with pytest.raises(FxpruneError, match="cannot be used"):
        found.load(str(tmp_path), device="cuda:99")


class _Hub(BaseHTTPRequestHandler):
    """A hub that has one model, and is slow, busy or closed for others."""

    def do_HEAD(self) -> None:
        owner = self.path.split("/")[1]
        if owner == "slow":
            time.sleep(1)
        statuses = {"busy": (503, ""), "closed": (403, "GatedRepo"), "bare": (404, "EntryNotFound")}
        status, code = statuses.get(owner, (404, "RepoNotFound") if owner == "no" else (200, ""))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        found.check_hub.cache_clear()
        yield address
        found.check_hub.cache_clear()
        server.shutdown()


def test_a_model_that_may_be_on_the_hub_is_left_to_those_who_fetch_it(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "_PATIENCE", 0.3)
    for model in ("our/model", "busy/model", "bare/model", "slow/model"):
        found.check_hub(model)


@pytest.mark.parametrize("model", ["no/model", "closed/model"])
def test_a_model_that_the_hub_refuses_is_refused(model: str, hub: str) -> None:
    with pytest.raises(FxpruneError, match=f"^{model}: {hub} refuses it: "):
        found.check_hub(model)


def test_a_hub_that_cannot_be_reached_is_reported_at_once(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/{revision}/{filename}")
    start = time.monotonic()
    with pytest.raises(FxpruneError, match=f"it is not in the cache, and {nowhere} cannot be reached: "):
        found.check_hub("our/model")
    assert time.monotonic() - start < 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FxpruneError, match=r"and the hub is not asked\. Unset HF_HUB_OFFLINE"):
        found.check_hub("our/other")


def test_a_model_in_the_cache_needs_no_hub(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, commit = tmp_path / "hub/models--no--model", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    found.check_hub("no/model")


def test_a_tilde_is_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in `--out=~/slim`, and a file was then written into a folder called so."""
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded(Path("~/slim.gguf")) == Path("/home/me/slim.gguf") and expanded(None) is None
    assert as_path("file", "~/a") == "/home/me/a"


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


def test_the_model_itself_is_never_written_over(here: Path) -> None:
    (here / "model").mkdir()
    for out in (Path("model"), Path("./model/"), here / "model"):
        with pytest.raises(FxpruneError, match="the model itself"):
            check_output(out, "model", force=True)
