"""Sequence models without softmax attention: selective scans, retention, gated memories, fast weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SelectiveScan(nn.Module):
    """A state-space model whose step, input and output matrices depend on the token, run as a loop over tokens."""

    def __init__(self, width: int, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.select = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.log(torch.arange(1, states + 1).float()).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        u, gate = self.into(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length]).transpose(1, 2)
        step, write, read = self.select(u).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.step(step))
        decay = torch.exp(torch.einsum("b l d, d n -> b l d n", step, -torch.exp(self.log_decay)))
        drive = torch.einsum("b l d, b l n, b l d -> b l d n", step, write, u)
        state, found = x.new_zeros(batch, self.inner, self.states), []
        for i in range(length):
            state = decay[:, i] * state + drive[:, i]
            found.append(torch.einsum("b d n, b n -> b d", state, read[:, i]))
        return self.out((torch.stack(found, dim=1) + u * self.skip) * F.silu(gate))


class Retention(nn.Module):
    """Heads with a decay each, in the form of one product, and a norm of each head's output."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(width, 4 * heads * inner, bias=False)
        self.norm = nn.GroupNorm(heads, heads * inner)
        self.out = nn.Linear(heads * inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        gamma = 1 - torch.exp2(-5.0 - torch.arange(self.heads, device=x.device))
        place = torch.arange(length, device=x.device)
        distance = place[:, None] - place[None, :]
        decay = torch.where(distance < 0, 0.0, gamma[:, None, None] ** distance.clamp(min=0))
        out = (q @ (k * k.shape[-1] ** -0.5).mT * decay) @ v
        out = self.norm(out.transpose(1, 2).reshape(batch * length, -1)).view(batch, length, -1)
        return self.out(F.silu(gate) * out)


class TimeMix(nn.Module):
    """A weighted running mean of values, in logarithms, with token shift; then a squared-relu channel mix."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.rand(4, width))
        self.decay, self.first = nn.Parameter(torch.randn(inner)), nn.Parameter(torch.randn(inner))
        self.key, self.value, self.receptance = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, width, bias=False)
        self.up, self.gate = nn.Linear(width, hidden, bias=False), nn.Linear(width, width, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = self.shift(x)
        a, b, c, d = (torch.lerp(last, x, m) for m in self.mix.unbind(0))
        k, v, r = self.key(a), self.value(b), torch.sigmoid(self.receptance(c))
        top, bottom, found = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
        for i in range(x.shape[1]):
            weight = torch.exp(k[:, i])
            now = torch.exp(self.first) * weight
            found.append((top + now * v[:, i]) / (bottom + now))
            top, bottom = (
                torch.exp(-torch.exp(self.decay)) * s + t for s, t in ((top, weight * v[:, i]), (bottom, weight))
            )
        x = x + self.output(r * torch.stack(found, dim=1))
        return x + torch.sigmoid(self.gate(d)) * self.down(torch.relu(self.up(d)) ** 2)


class DeltaRule(nn.Module):
    """Fast weights: each head's memory forgets, and is corrected at each token. Keys have length one."""

    def __init__(self, width: int, heads: int, keys: int, values: int) -> None:
        super().__init__()
        self.heads, self.sizes = heads, (heads * keys, heads * keys, heads * values)
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(sum(self.sizes), sum(self.sizes), 3, padding=2, groups=sum(self.sizes), bias=False)
        self.rates = nn.Linear(width, 2 * heads, bias=False)
        self.decay = nn.Parameter(torch.rand(heads))
        self.norm = nn.RMSNorm(values)
        self.gate, self.out = nn.Linear(width, heads * values), nn.Linear(heads * values, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        mixed = F.silu(self.conv(self.qkv(x).mT)[..., :length].mT)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in mixed.split(self.sizes, dim=-1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, alpha = (t for t in self.rates(x).chunk(2, dim=-1))
        beta, keep = torch.sigmoid(beta), torch.exp(-self.decay.exp() * F.softplus(alpha))
        memory, found = x.new_zeros(batch, self.heads, k.shape[-1], v.shape[-1]), []
        for i in range(length):
            memory = memory * keep[:, i, :, None, None]
            error = (v[:, i] - (k[:, i, :, None, :] @ memory).squeeze(-2)) * beta[:, i, :, None]
            memory = memory + k[:, i, :, :, None] * error[:, :, None, :]
            found.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory))
        out = self.norm(torch.stack(found, dim=1)).flatten(-2)
        return self.out(out * torch.sigmoid(self.gate(x)))


class MemoryLM(nn.Module):
    """A residual network of one of these layers between embeddings."""

    def __init__(self, mixer: nn.Module, width: int = 16, vocabulary: int = 31) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm, self.mixer, self.last = nn.RMSNorm(width), mixer, nn.RMSNorm(width)
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.readout(self.last(x + self.mixer(self.norm(x))))
