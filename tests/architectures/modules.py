"""Networks put together from torch's own transformer modules."""

from __future__ import annotations

import torch
from torch import nn


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over embedded tokens, padding left out."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(31, 18)
        layer = nn.TransformerEncoderLayer(18, 3, 22, activation="gelu", batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(18, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=ids == 3)
        return self.head(x)


class Translator(nn.Module):
    """`nn.Transformer` from one sequence to another, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 20, batch_first=True, bias=False)
        self.head = nn.Linear(16, 31, bias=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


class Reader(nn.Module):
    """`nn.MultiheadAttention` from learnt queries to tokens of another width; the weights of attention come out too."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 12))
        self.embedding, self.place = nn.Embedding(31, 10), nn.Embedding(20, 10)
        self.attention = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True, add_bias_kv=True)
        self.out = nn.Linear(12, 6)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        out, weights = self.attention(self.queries.expand(ids.shape[0], -1, -1), x, x)
        return self.out(out), weights


class Recurrent(nn.Module):
    """Two layers of states that run both ways, of `nn.LSTM` or `nn.GRU`."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 6)
        self.states = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.states(self.embedding(ids))[0])
