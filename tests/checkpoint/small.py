"""Slim models made without pruning, and what tests do with checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxprune.checkpoint.manifest import content_digest
from fxprune.emit.emitter import emit
from tests.models import all_tensors, tiny


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest that was edited, with the digest of its new content."""
    data = {name: value for name, value in manifest.items() if name != "digest"}
    return {**data, "digest": content_digest(data)}


def narrow(width: int = 24) -> Any:
    """A model whose second layer has ``width`` channels, by whose number those of the others are left alone."""
    dense: Any = tiny("llama")
    tensors = all_tensors(dense)
    for name, axis in {"gate": 0, "up": 0, "down": 1}.items():
        path = f"model.layers.1.mlp.{name}_proj.weight"
        tensors[path] = tensors[path].detach().index_select(axis, torch.arange(width))
    emission = emit(dense, tensors)
    assert emission.model is not None, emission.reasons
    return emission.model


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of JSON; a manifest has the digest of its new content."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(sealed(data) if "digest" in data else data))
