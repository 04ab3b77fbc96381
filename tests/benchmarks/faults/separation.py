"""Separation of two speakers: a small convolutional masker on waveforms, permutation invariant SI-SDR, Adam with clipping."""

from __future__ import annotations

import math

import torch
from torch import nn

from faults._training import Batch, Tensors, Training, seeded

SAMPLES, RATE, CHANNELS, WINDOW, BATCH = 512, 4000, 24, 16, 6


class Layer(nn.Module):
    """A residual block of a temporal convolutional network."""

    def __init__(self, dilation: int, norm, activation) -> None:
        super().__init__()
        self.norm = norm(CHANNELS)
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation)
        self.activation = activation()
        self.out = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        return x + self.out(self.activation(self.conv(self.norm(x))))


class Separator(nn.Module):
    def __init__(self, norm=lambda channels: nn.GroupNorm(1, channels), activation=nn.PReLU) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, CHANNELS, WINDOW, WINDOW // 2, bias=False)
        self.layers = nn.Sequential(*(Layer(2**i, norm, activation) for i in range(3)))
        self.mask = nn.Conv1d(CHANNELS, 2 * CHANNELS, 1)
        self.sigmoid = nn.Sigmoid()
        self.decoder = nn.ConvTranspose1d(CHANNELS, 1, WINDOW, WINDOW // 2, bias=False)

    def forward(self, mixture):
        encoded = self.encoder(mixture[:, None])
        masks = self.sigmoid(self.mask(self.layers(encoded))).unflatten(1, (2, CHANNELS))
        parts = (masks * encoded[:, None]).flatten(0, 1)
        return self.decoder(parts).view(len(mixture), 2, -1)


def voices(n: int, generator: torch.Generator) -> torch.Tensor:
    """A low and a high voice of changing pitch and level, in random order: (batch, 2, time)."""
    time = torch.arange(SAMPLES) / RATE

    def voice(low: float, high: float) -> torch.Tensor:
        pitch = low + (high - low) * torch.rand(n, 1, 1, generator=generator)
        glide = 0.2 * torch.randn(n, 1, 1, generator=generator)
        orders = torch.arange(1, 5)[:, None]
        phase = 2 * math.pi * torch.rand(n, 4, 1, generator=generator)
        tones = torch.cos(2 * math.pi * orders * pitch * time * (1 + glide * time) + phase) / orders
        beat = 1 + 0.8 * torch.cos(2 * math.pi * 12 * time + 6 * torch.rand(n, 1, generator=generator))
        return tones.sum(1) * beat * (0.7 + 0.6 * torch.rand(n, 1, generator=generator))

    pair = torch.stack([voice(90, 160), voice(330, 480)], 1)
    order = torch.rand(n, 2, generator=generator).argsort(1)
    return pair[torch.arange(n)[:, None], order] + 0.01 * torch.randn(n, 2, SAMPLES, generator=generator)


def si_sdr(estimates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """In dB, over the last axis. Source: Le Roux et al. 2019, arXiv:1811.02508."""
    scale = (estimates * references).sum(-1, keepdim=True) / (references.square().sum(-1, keepdim=True) + 1e-8)
    target = scale * references
    ratio = target.square().sum(-1) / ((target - estimates).square().sum(-1) + 1e-8)
    return 10 * torch.log10(ratio + 1e-8)


def pit(estimates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Negative SI-SDR under the best assignment of each item, in dB."""
    straight = si_sdr(estimates, references).mean(1)
    crossed = si_sdr(estimates, references.flip(1)).mean(1)
    return -torch.maximum(straight, crossed).mean()


def shown(loss: torch.Tensor, estimates: torch.Tensor, batch: Batch) -> Tensors:
    return {"loss": loss, "estimates": estimates, "references": batch[1], "mixture": batch[0]}


def forward(model: nn.Module, batch: Batch) -> Tensors:
    mixture, references = batch
    estimates = model(mixture)
    return shown(pit(estimates, references), estimates, batch)


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {"si_sdr_db": -float(pit(tensors["estimates"], batch[1]))}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)

    def sample(step: int, phase: str) -> Batch:
        references = voices(BATCH, seeded(seed, step, len(phase)))
        return references.sum(1), references

    return Training(Separator(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 2e-3), clip=5.0)
