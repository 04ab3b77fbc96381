"""Models and steps of the healthy runs of this folder."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import language, retrieval, tabular
from faults.tabular import EACH, NUMBERS, SIZES

if TYPE_CHECKING:
    from faults._training import Training


def trained(t: Training, steps: int) -> None:
    """Train it, before anybody looks."""
    optimizer = t.optimize(t.model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(20_000 + step, "train"))["loss"].backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        optimizer.step()
    t.model.zero_grad()


class LowRank(nn.Module):
    """A frozen layer and a difference of rank four, whose second factor starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + 2 * self.up(self.down(x))


class Experts(nn.Module):
    """Four feed-forward networks, the two best of which see each token; `balance` is one where all are used alike."""

    def __init__(self, width: int = language.WIDTH) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(4)
        )
        self.balance = torch.zeros(())

    def forward(self, x):
        chances = self.router(x).softmax(-1)
        best, chosen = chances.topk(2, -1)
        weights = torch.zeros_like(chances).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        shares = (weights > 0).float().flatten(0, -2).mean(0) / 2
        self.balance = 4 * (shares * chances.flatten(0, -2).mean(0)).sum()
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            used = weights[..., i] > 0
            made[used] = made[used] + weights[used][:, i : i + 1] * expert(x[used])
        return made


class Columns(nn.Module):
    """A token for each column and one for the answer, and two layers of a transformer. Gorishniy et al. 2021."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUMBERS, width) * 0.3)
        self.bias = nn.Parameter(torch.randn(NUMBERS, width) * 0.3)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in SIZES)
        self.answer = nn.Parameter(torch.randn(1, 1, width) * 0.3)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, numbers, categories):
        tokens = [self.answer.expand(len(numbers), -1, -1), numbers[..., None] * self.weight + self.bias]
        tokens += [table(categories[:, i : i + 1]) for i, table in enumerate(self.tables)]
        return self.head(self.norm(self.encoder(torch.cat(tokens, 1))[:, 0]))[:, 0]


class Tasks(tabular.Table):
    """A price, and whether the row is kept, with a learnt uncertainty of each. Kendall et al. 2017, arXiv:1705.07115."""

    def __init__(self) -> None:
        super().__init__(outputs=2, activation=nn.LeakyReLU, dropout=0.0)
        self.uncertainty = nn.Parameter(torch.zeros(2))


class Periods(nn.Module):
    """Sines and cosines of learnt frequencies of each column, and a layer of its own. Gorishniy et al. 2022."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.3 * torch.randn(NUMBERS, 8))
        self.weight = nn.Parameter(torch.randn(NUMBERS, 16, EACH) / 4)
        self.activation = nn.ReLU()

    def forward(self, numbers):
        angles = 2 * math.pi * numbers[..., None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        return self.activation(torch.einsum("bcf,cfe->bce", waves, self.weight)).flatten(1)


class Queued(retrieval.TwoTowers):
    """A text tower that follows slowly by momentum, and a queue of 256 of its captions as further negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.text).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(256, retrieval.WIDTH), dim=-1))

    def forward(self, frames, words):
        audio, text = F.normalize(self.audio(frames), dim=-1), F.normalize(self.text(words), dim=-1)
        with torch.no_grad():
            kept = F.normalize(self.slow(words), dim=-1)
        scale = self.scale.clamp(max=math.log(100.0)).exp()
        return scale * audio @ text.T, scale * audio @ torch.cat([kept, self.queue]).T, kept

    def follow(self, kept: torch.Tensor) -> None:
        with torch.no_grad():
            for own, slow in zip(self.text.parameters(), self.slow.parameters(), strict=True):
                slow.lerp_(own, 0.05)
            self.queue.copy_(torch.cat([kept, self.queue[: -len(kept)]]))
