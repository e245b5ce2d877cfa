"""Networks on images and sound: transformers on patches, convolutions in groups, down and up again, token mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchAttention(nn.Module):
    """q, k and v from one projection by `unbind`, normed by head, with a table of biases for relative places."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2 + 1, heads))
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + side - 1
        index = F.pad(apart[0] * (2 * side - 1) + apart[1], (1, 0, 1, 0), value=(2 * side - 1) ** 2)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=bias.unsqueeze(0))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class PatchBlock(nn.Module):
    """Both branches are scaled by channel."""

    def __init__(self, width: int, heads: int, hidden: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PatchAttention(width, heads, side)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.rand(width)) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.fc2(F.glu(self.fc1(self.norm2(x)), dim=-1))


class PatchTransformer(nn.Module):
    """A class token before the patches, learnt places, a head on the class token and the mean of the others."""

    def __init__(self, width: int = 24, heads: int = 3, hidden: int = 20) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(PatchBlock(width, heads, hidden, 2) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(2 * width, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.places
        x = self.norm(self.blocks(x))
        return self.head(torch.cat((x[:, 0], x[:, 1:].mean(dim=1)), dim=-1))


class Bottleneck(nn.Module):
    """Narrow, in groups, wide; batch norms; channels weighed by what the whole image says; a short cut."""

    def __init__(self, width: int, inner: int, groups: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2, self.conv3, self.bn3 = (
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.squeeze, self.excite = nn.Conv2d(out, 5, 1), nn.Conv2d(5, out, 1)
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = F.relu(self.bn2(self.conv2(h)), inplace=True)
        h = self.bn3(self.conv3(h))
        h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        h += self.down(x)
        return F.relu(h, inplace=True)


class GroupedNet(nn.Module):
    """Residual stages of grouped convolutions under a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.Hardswish(), nn.MaxPool2d(2, 1, 1))
        self.stages = nn.Sequential(Bottleneck(10, 12, 4, 14, 1), Bottleneck(14, 15, 3, 18, 2))
        self.head = nn.Linear(18, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.stages(self.stem(image)), (1, 1)), 1))


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


class SpeechBlock(nn.Module):
    """A strided convolution over sound, then a depthwise one behind a gate, with weight norm on the way out."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.listen = nn.Sequential(nn.Conv1d(1, 8, 5, 3, bias=False), nn.GroupNorm(8, 8), nn.GELU())
        self.project = nn.Linear(8, width)
        self.pointwise = nn.Conv1d(width, 2 * 10, 1)
        self.depthwise, self.norm = nn.Conv1d(10, 10, 3, padding=1, groups=10), nn.BatchNorm1d(10)
        self.back = nn.Conv1d(10, width, 1)
        self.place = nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 4, padding=2, groups=3), dim=2)
        self.head = nn.Linear(width, 7)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        x = self.project(self.listen(sound[:, None]).transpose(1, 2)).transpose(1, 2)
        x = x + F.gelu(self.place(x)[..., :-1])
        x = x + self.back(F.silu(self.norm(self.depthwise(F.glu(self.pointwise(x), dim=1)))))
        return self.head(x.transpose(1, 2))
