"""A real model, pruned by a fifth, is saved and loaded in a fresh process, and says the same there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxprune
from benchmarks.demo_model import load_demo_model

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
TELL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def tell(folder, load):
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[1], return_tensors="pt")
    print(load(folder).generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist())

sys.modules["fxprune"] = None  # stock transformers is all there is
tell(sys.argv[2], AutoModelForCausalLM.from_pretrained)
del sys.modules["fxprune"]
import fxprune
tell(sys.argv[3], fxprune.from_pretrained)
"""


def told(model: torch.nn.Module, tokenizer: object) -> str:
    """The tokens that ``model`` goes on with."""
    ids = tokenizer(PROMPT, return_tensors="pt")
    return str(model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist())


def told_elsewhere(stock: Path, ours: Path) -> list[str]:
    """What two checkpoints go on with in a fresh process, the first one before it has this package."""
    command = [sys.executable, "-c", TELL, PROMPT, str(stock), str(ours)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_the_demo_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """With the same widths in all layers, by stock transformers; with widths of their own, by this package."""
    dense, tokenizer = load_demo_model()
    dense = dense.float()
    said = []
    for uniform in (True, False):
        folder = tmp_path / f"uniform-{uniform}"
        result = fxprune.prune(dense, None, ratio=0.2, importance="l2", uniform=uniform)
        structure = result.save_pretrained(folder, tokenizer)
        assert structure.is_stock == uniform
        assert abs(result.report.achieved - 0.2) < 0.005
        parameters = sum(p.numel() for p in result.model.parameters())
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size == pytest.approx(parameters * 4, rel=0.02)
        said.append(told(result.model, tokenizer))
    assert told_elsewhere(tmp_path / "uniform-True", tmp_path / "uniform-False") == said
