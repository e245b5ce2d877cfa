"""Language models that differ in how heads, positions and residuals are written."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def angles(width: int, length: int) -> torch.Tensor:
    """Unit complex numbers `(length, width / 2)`, turned by position and frequency."""
    frequencies = 1e4 ** (-torch.arange(0, width, 2)[: width // 2].float() / width)
    turns = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(turns), turns)


class ComplexAttention(nn.Module):
    """Grouped-query attention; pairs of neighbours are complex numbers, turned by multiplication."""

    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.heads, self.groups, self.inner = heads, groups, inner
        self.wq = nn.Linear(width, heads * inner, bias=False)
        self.wk = nn.Linear(width, groups * inner, bias=False)
        self.wv = nn.Linear(width, groups * inner, bias=False)
        self.wo = nn.Linear(heads * inner, width, bias=False)

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * by.view(1, by.shape[0], 1, by.shape[1])).flatten(3).type_as(x)

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, groups, inner = x.shape
        copies = x[:, :, :, None, :].expand(batch, length, groups, self.heads // groups, inner)
        return copies.reshape(batch, length, self.heads, inner)

    def forward(self, x: torch.Tensor, by: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.turn(self.wq(x).view(batch, length, self.heads, self.inner), by).transpose(1, 2)
        k = self.turn(self.wk(x).view(batch, length, self.groups, self.inner), by)
        k, v = (self.repeat(t).transpose(1, 2) for t in (k, self.wv(x).view(batch, length, self.groups, self.inner)))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.inner) + mask
        out = F.softmax(scores.float(), dim=-1).type_as(q) @ v
        return self.wo(out.transpose(1, 2).contiguous().view(batch, length, -1))


class ComplexBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention = ComplexAttention(width, 6, 2, 8)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor, by: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), by, mask)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class ComplexRotaryLM(nn.Module):
    """Positions as complex numbers kept in a plain attribute."""

    def __init__(self, vocabulary: int = 31, width: int = 20, hidden: int = 28, layers: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(ComplexBlock(width, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.angles = angles(8, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf, device=tokens.device).triu(1)
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.angles[:length], mask)
        return self.output(self.norm(x))


class ParallelBlock(nn.Module):
    """One fused projection for q, one key and value for all heads, and a gated network; both branches in parallel."""

    def __init__(self, width: int, heads: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.sizes = heads, (heads * inner, inner, inner, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.fused = nn.Linear(width, sum(self.sizes), bias=False)
        self.attention_out = nn.Linear(heads * inner, width, bias=False)
        self.network_out = nn.Linear(hidden, width, bias=False)
        self.scale = inner**-0.5
        slopes = 2 ** (-8 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes.view(heads, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v, network = self.fused(self.norm(x)).split(self.sizes, dim=-1)
        q = q.reshape(*q.shape[:2], self.heads, -1).permute(0, 2, 1, 3) * self.scale
        scores = torch.einsum("b h i d, b j d -> b h i j", q, k)
        place = torch.arange(length, device=x.device)
        scores = scores - self.slopes * (place[:, None] - place[None, :]).abs()
        scores = 5 * torch.tanh(scores / 5)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(mask, -torch.finfo(scores.dtype).max).softmax(dim=-1)
        out = torch.einsum("b h i j, b j d -> b h i d", weights, v).permute(0, 2, 1, 3).flatten(2)
        value, gate = network.chunk(2, dim=-1)
        return self.attention_out(out) + self.network_out(F.silu(gate) * value)


class ParallelLM(nn.Module):
    """Parallel residuals, one key head, slopes in a buffer, soft caps, and one block used twice; tied embeddings."""

    def __init__(self, vocabulary: int = 31, width: int = 18) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(ParallelBlock(width, 4, 5, 22) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocabulary, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            for block in self.blocks:
                x = x + block(x)
        logits = self.readout(self.norm(x))
        return 30 * torch.tanh(logits / 30)


class LatentAttention(nn.Module):
    """Queries, keys and values by way of narrow latents; one rotary key for all heads beside those of each head."""

    def __init__(self, width: int, heads: int, plain: int, turned: int, value: int) -> None:
        super().__init__()
        self.heads, self.plain, self.turned, self.value = heads, plain, turned, value
        self.q_down, self.q_norm = nn.Linear(width, 11, bias=False), nn.RMSNorm(11)
        self.q_up = nn.Linear(11, heads * (plain + turned), bias=False)
        self.kv_down, self.kv_norm = nn.Linear(width, 9 + turned, bias=False), nn.RMSNorm(9)
        self.kv_up = nn.Linear(9, heads * (plain + value), bias=False)
        self.out = nn.Linear(heads * value, width, bias=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = 1e4 ** (-torch.arange(0, self.turned, 2, device=x.device).float() / self.turned)
        turns = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * turns.cos() - odd * turns.sin(), even * turns.sin() + odd * turns.cos()), dim=-1)
        return turned.flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_up(self.q_norm(self.q_down(x))).view(batch, length, self.heads, -1).transpose(1, 2)
        q_plain, q_turned = q.split([self.plain, self.turned], dim=-1)
        latent, k_turned = self.kv_down(x).split([9, self.turned], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).view(batch, length, self.heads, -1).transpose(1, 2)
        k_plain, v = kv.split([self.plain, self.value], dim=-1)
        k_turned = self.rotate(k_turned[:, None]).expand(-1, self.heads, -1, -1)
        q, k = torch.cat((q_plain, self.rotate(q_turned)), dim=-1), torch.cat((k_plain, k_turned), dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class LatentLM(nn.Module):
    """Latent attention and a plain network, with learnt positions, and norms after each branch."""

    def __init__(self, vocabulary: int = 31, width: int = 20) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(1, 32, width))
        self.attention = LatentAttention(width, heads=3, plain=5, turned=6, value=7)
        self.network = nn.Sequential(nn.Linear(width, 26), nn.GELU(), nn.Dropout(0.1), nn.Linear(26, width))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.readout = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places[:, : ids.shape[1]]
        x = x + self.norms[0](self.attention(x))
        x = x + self.norms[1](self.network(x))
        return self.readout(self.norms[2](x))
