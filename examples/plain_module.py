"""Prune a module that is not from Hugging Face, fine-tune it, and export it as one program."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxprune


class Block(nn.Module):
    """Attention and an MLP with residual connections."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, tokens, width)``."""
        n = self.norm(x)
        q, k, v = (m(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        down: torch.Tensor = self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + down


class Classifier(nn.Module):
    """An embedding, blocks, and class scores for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 48)
        self.blocks = nn.ModuleList(Block(48, heads=6, hidden=128) for _ in range(3))
        self.head = nn.Linear(48, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scores ``(batch, 5)`` for ids ``(batch, tokens)``."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        scores: torch.Tensor = self.head(x.mean(1))
        return scores


def main() -> None:
    """Prune heads and channels, train the slim graph for a few steps, and export it."""
    torch.manual_seed(0)
    model, inputs = Classifier().eval(), {"tokens": torch.randint(100, (4, 12))}
    result = fxprune.prune(
        model, recipe="llm-pruner", importance="l2", kinds=["mlp", "head"], ratio=0.25, example_inputs=inputs
    )
    print(f"{result.report.achieved:.1%} of the parameters removed: {result.report.widths}")
    slim, labels = result.graph_module, torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(slim.parameters(), lr=1e-2)
    for step in range(10):
        loss = F.cross_entropy(slim(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, 9):
            print(f"step {step}: loss {loss.item():.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = fxprune.export_graph(slim, Path(folder) / "slim.pt2")
        program = torch.export.load(path).module()
        print(f"the program gives the same output: {torch.allclose(program(**inputs), slim(**inputs), atol=1e-5)}")


if __name__ == "__main__":
    main()
