"""Draw the pictures of the documentation with Graphviz into docs/pictures/: `python -m benchmarks.pictures`.

They show a layer and the whole of a Llama-2-7B, built on `meta` from its config, and a plan for the demo model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fxprune
from benchmarks.common import ROOT, load_demo_model

FOLDER = ROOT / "docs" / "pictures"


def graph_of_7b() -> nx.Graph[Any]:
    """Dependency graph of a Llama-2-7B, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"))
    return fxprune.dependency_graph(fxprune.trace(model, dynamic=False), "masked")


def draw_all(folder: Path = FOLDER) -> None:
    """Draw all pictures into a folder."""
    graph = graph_of_7b()
    fxprune.write_dot(graph, folder / "layer.svg")
    fxprune.write_dot(graph, folder / "model.svg", everything=True)
    fxprune.write_dot(graph, folder / "channel.svg", group="model/channel")
    model, _ = load_demo_model()
    result = fxprune.prune(model, recipe="llm-pruner", importance="l2", ranking="global", ratio=0.25)
    demo = fxprune.dependency_graph(fxprune.trace(model, dynamic=False), result.plan.norm)
    fxprune.write_dot(demo, folder / "plan.svg", everything=True, plan=result.plan)


if __name__ == "__main__":
    draw_all()
