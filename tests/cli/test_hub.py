"""One look at a hub: what it says, and that it is not there; in processes of their own, as its address is read once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fxprune.cli.hub

CODE = """
import sys, time
from fxprune.cli.hub import check_hub
from fxprune.errors import FxpruneError
start = time.monotonic()
try:
    check_hub(sys.argv[1])
except FxpruneError as error:
    print(error)
print(time.monotonic() - start < 4 and "torch" not in sys.modules)
"""


class _Hub(BaseHTTPRequestHandler):
    """Has one model, and is slow, busy and closed for others."""

    def do_HEAD(self) -> None:
        """Answer."""
        owner = self.path.split("/")[1]
        if owner == "slow":
            time.sleep(2)
        status, code = {"busy": (503, ""), "closed": (403, "GatedRepo"), "bare": (404, "EntryNotFound")}.get(
            owner, (404, "RepoNotFound") if owner == "no" else (200, "")
        )
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def asked(model: str, hub: str, home: Path, **more: str) -> str:
    """What is said of a model, and whether that was quick and without torch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **more}
    command = [sys.executable, "-c", CODE, model]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize("model", ["our/model", "busy/model", "bare/model"])
def test_what_may_be_there_is_left_to_those_who_fetch_it(model: str, hub: str, tmp_path: Path) -> None:
    assert asked(model, hub, tmp_path) == "True\n"


@pytest.mark.parametrize("model", ["no/model", "closed/model"])
def test_what_the_hub_does_not_give_is_told(model: str, hub: str, tmp_path: Path) -> None:
    told = asked(model, hub, tmp_path)
    assert told.startswith(f"{model}: {hub} does not give it: ") and told.endswith("True\n")


def test_a_slow_hub_is_given_its_time(hub: str, tmp_path: Path) -> None:
    assert asked("slow/model", hub, tmp_path, HF_HUB_ETAG_TIMEOUT="1") == "True\n"


def test_a_hub_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    told = asked("our/model", "http://127.0.0.1:9", tmp_path)
    assert told.startswith(
        "our/model: it is no folder here and in no cache, and http://127.0.0.1:9 cannot be reached: "
    )
    assert told.endswith("True\n")
    told = asked("our/model", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "and hubs are not asked. Unset HF_HUB_OFFLINE" in told and told.endswith("True\n")


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    folder, commit = tmp_path / "hub/models--our--model", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    assert asked("our/model", "http://127.0.0.1:9", tmp_path) == "True\n"
    assert fxprune.cli.hub.check_hub.cache_info().maxsize is None, "each model is asked for once"
