"""Positions in two dimensions, projections that interleave q, k and v by head, and scaled residuals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Rotary(nn.Module):
    """Tables of cosines and sines, `(positions, 1, width)`, for two halves alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, width, 2).float() / width))

    def forward(self, x: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.einsum("i,j->ij", torch.arange(length, device=x.device).type_as(self.inv_freq), self.inv_freq)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos()[:, None, :].type_as(x), both.sin()[:, None, :].type_as(x)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """`x (tokens, batch, heads, width)` turned by the angles of `position (tokens, batch)`."""
    cos, sin = (F.embedding(position, table.squeeze(1)).unsqueeze(2) for table in tables)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Queries and keys are in two parts, turned by the place in the text and by the place in the gap."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.inner = heads, layer + 1, width // heads
        self.rotary = Rotary(self.inner // 2)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, position: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length, batch, _ = x.shape
        mixed = self.query_key_value(x).view(length, batch, self.heads, 3 * self.inner)
        query, key, value = torch.split(mixed, self.inner, dim=3)
        tables = self.rotary(value, 16)
        halves = [(part.chunk(2, dim=-1)) for part in (query, key)]
        query, key = (torch.cat((rotate(a, tables, position), rotate(b, tables, block)), dim=-1) for a, b in halves)
        query = query / (math.sqrt(self.inner) * self.layer)
        query = query.reshape(length, batch * self.heads, -1)
        key = key.reshape(length, batch * self.heads, -1)
        value = value.reshape(length, batch * self.heads, -1)
        scores = torch.baddbmm(
            torch.zeros(1, 1, 1, dtype=x.dtype, device=x.device),
            query.transpose(0, 1),
            key.transpose(0, 1).transpose(1, 2),
            beta=0.0,
        ).view(batch, self.heads, length, length)
        scores = scores.masked_fill(mask, -1e4).float() * self.layer
        weights = F.softmax(scores, dim=-1).type_as(x).view(batch * self.heads, length, length)
        context = torch.bmm(weights, value.transpose(0, 1)).view(batch, self.heads, length, self.inner)
        return self.dense(context.permute(2, 0, 1, 3).contiguous().view(length, batch, -1))


class Block(nn.Module):
    """Residuals that carry the normed input, scaled by the depth."""

    def __init__(self, width: int, heads: int, hidden: int, layer: int, layers: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, layer)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.alpha = (2 * layers) ** 0.5

    def forward(self, x: torch.Tensor, position: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        normed = self.before(x)
        x = normed * self.alpha + self.attention(normed, position, block, mask)
        normed = self.between(x)
        return normed * self.alpha + self.down(F.gelu(self.up(normed), approximate="tanh"))


class TwoDimensionalLM(nn.Module):
    """A prefix that sees itself, then a text that sees what came before."""

    def __init__(
        self, vocabulary: int = 31, width: int = 24, heads: int = 3, hidden: int = 20, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden, i, layers) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, prefix: int = 3) -> torch.Tensor:
        batch, length = input_ids.shape
        place = torch.arange(length, device=input_ids.device)
        position = place.clamp(max=prefix - 1)[:, None].expand(length, batch)
        block = (place - prefix + 1).clamp(min=0)[:, None].expand(length, batch)
        mask = (place[None, :] > place[:, None]) & (place[None, :] >= prefix)
        x = self.embedding(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, position, block, mask)
        return self.head(self.norm(x)).transpose(0, 1).contiguous()
