"""Nonsense in, a clear error out, and nothing changed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import errors
from fxprune.errors import VerificationError
from fxprune.masking.compare import require_equal
from fxprune.pipeline.contract import PassResult
from tests.models import tiny, token_ids

IDS = token_ids(4, 12)


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
        fxprune.prune(tiny("llama"), IDS, recipe="llm-pruner", protect=())
    with pytest.raises(VerificationError):
        require_equal(float("nan"), "nowhere")


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
