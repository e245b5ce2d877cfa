"""The package as a command, its face, and its errors."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxprune
import fxprune.__main__
import fxprune.api
from fxprune import errors
from fxprune.api import prune, prune_pipeline
from fxprune.data.samples import read_calibration
from fxprune.errors import ArgumentError, CalibrationError, VerificationError
from fxprune.pipeline.contract import PassResult
from fxprune.pipeline.registry import load_pass
from tests.models import tiny, token_ids
from tests.remembered import traced


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_package_is_a_command() -> None:
    done = python("-m", "fxprune", "--help")
    assert done.returncode == 0 and "prune" in done.stdout
    assert fxprune.__main__.main is fxprune.cli.main


def test_it_tells_its_version() -> None:
    assert python("-m", "fxprune", "--version").stdout.strip() == f"fxprune {fxprune.__version__}"


def test_threads_sleep_after_a_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are read when torch is imported, which a command does after they are set."""
    monkeypatch.setattr(sys, "argv", ["fxprune", "--version"])
    monkeypatch.setattr("fxprune.cli.console.install", lambda: None)
    monkeypatch.setattr("fxprune.cli.console.finish", lambda: None)
    count = fxprune.cli.SPIN_COUNT
    for policy, before, after in ((None, None, count), (None, "7", "7"), ("ACTIVE", None, None), ("PASSIVE", "7", "7")):
        for name, value in (("OMP_WAIT_POLICY", policy), ("GOMP_SPINCOUNT", before)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            fxprune.cli.main()
        assert os.environ.get("GOMP_SPINCOUNT") == after
        assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_help_needs_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "networkx", "numpy", "peft", "datasets", "lm_eval", "matplotlib"}
    done = python("-c", f"import sys, fxprune.cli; fxprune.cli.app; print(sorted({heavy} & sys.modules.keys()))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_function_keeps_the_name_that_its_room_has_too() -> None:
    done = python("-c", "import fxprune.trace.capture, fxprune; print(callable(fxprune.trace), fxprune.trace.__name__)")
    assert done.stdout.strip() == "True trace", done.stderr
    assert set(fxprune.__all__) <= set(dir(fxprune)) and all(hasattr(fxprune, name) for name in fxprune.__all__)
    assert all(getattr(fxprune, name).__name__ == name for name in ("prune", "trace", "Result", "explain"))


def test_passes_are_taken_as_they_are() -> None:
    mine = load_pass("l1", kinds=("channel",))
    assert prune_pipeline(importance=mine, verify=False).passes[1] is mine


def test_weights_of_a_module_cannot_be_offloaded() -> None:
    with pytest.raises(ArgumentError, match="the weights of a module are in memory already"):
        prune(torch.nn.Linear(2, 2), offload="work")


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (IDS + 125, "input_ids holds 136, the model knows 0 to 130"),
        ("{'input_ids': [1, 2, 300]}", "input_ids holds 300"),
        ("", "the calibration data is empty"),
    ],
)
def test_samples_that_the_model_cannot_read_are_refused_before_it_is_traced(
    data: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A string stands for the content of a file that the recipe reads."""
    monkeypatch.setattr(fxprune.api, "trace", lambda *_: pytest.fail("traced"))
    options: dict[str, Any] = {"importance": "wanda"}
    if isinstance(data, str):
        (tmp_path / "rows.jsonl").write_text(data.replace("'", '"'))
        file = str(tmp_path / "rows.jsonl")
        options = {"recipe": f"calibrate{{file={file!r}}}, find-groups, wanda, select-by-ratio, shrink"}
        data = None
    with pytest.raises(CalibrationError, match=text):
        prune(tiny("llama"), data, **options)


def test_samples_of_two_bytes_a_token_are_read() -> None:
    """Ids of numpy's uint16, as corpora of ids are stored in, were refused with an overflow."""
    made = read_calibration(IDS.numpy().astype(np.uint16), traced("llama"))
    assert torch.equal(torch.cat([sample.inputs["input_ids"] for sample in made]), IDS)


TOKENS = token_ids(4, 12)


def test_a_wrong_slim_module_is_caught_and_located(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.passes.shrink import RewriteLiteralsPass

    original = RewriteLiteralsPass.call

    def sabotage(self: RewriteLiteralsPass, graph_module: Any) -> Any:
        original(self, graph_module)
        node = next(n for n in graph_module.graph.nodes if "silu" in str(n.target))
        node.target = torch.ops.aten.gelu.default
        return PassResult(graph_module, True)

    monkeypatch.setattr(RewriteLiteralsPass, "call", sabotage)
    with pytest.raises(VerificationError, match=r"silu.*in model.layers.0.mlp"):
        fxprune.prune(tiny("llama"), TOKENS, recipe="llm-pruner", protect=())


@pytest.mark.parametrize("room", ["fxprune", "passes"])
def test_every_error_says_where_and_what_to_do(room: str) -> None:
    """Other errors than those of the axis algebra, which become reasons, reach a user."""
    kinds = {name for name in dir(errors) if name.endswith("Error")} - {"UnknownNameError"}
    found = []
    for file in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                said = {keyword.arg for keyword in node.keywords}
                found += [] if {"where", "remedy"} <= said else [f"{file.name}:{node.lineno} {node.func.id}"]
    assert found == []
