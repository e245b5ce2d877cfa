"""Networks on images: down and up again with a transposed convolution, and a mixer of tokens and channels."""

from __future__ import annotations

import torch
from torch import nn


class DownAndUp(nn.Module):
    """Half the size and back, with group norms, a transposed convolution, and what was there before put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.GroupNorm(5, 20), nn.SiLU())
        self.up = nn.ConvTranspose2d(20, 9, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(21, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU(16))
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        before = self.first(image)
        after = self.up(self.down(before))
        return self.out(self.last(torch.cat((before, after), dim=1)))


class TokenMixer(nn.Module):
    """One network across tokens, one across channels."""

    def __init__(self, tokens: int = 9, width: int = 14) -> None:
        super().__init__()
        self.patches = nn.Unfold(2, stride=2)
        self.embed = nn.Linear(12, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 11), nn.GELU(), nn.Linear(11, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 17), nn.GELU(), nn.Linear(17, width))
        self.head = nn.Linear(width, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(self.patches(image).mT)
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))
