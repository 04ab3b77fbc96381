"""Causal speech enhancement: a mask on noisy magnitudes from past frames only, compressed magnitudes in the loss, Adam."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

BINS, FRAMES, WIDTH, BATCH = 24, 30, 32, 10


class Causal(nn.Module):
    """Convolution over past frames, normalisation of each frame, activation: (batch, channels, frames)."""

    def __init__(self, inputs: int, outputs: int, norm, activation) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3)
        self.norm = norm(outputs)
        self.activation = activation()

    def forward(self, x):
        x = self.conv(F.pad(x, (2, 0)))
        return self.activation(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Enhancer(nn.Module):
    def __init__(self, norm=nn.LayerNorm, activation=nn.ReLU) -> None:
        super().__init__()
        self.layer1 = Causal(BINS, WIDTH, norm, activation)
        self.layer2 = Causal(WIDTH, WIDTH, norm, activation)
        self.layer3 = Causal(WIDTH, WIDTH, norm, activation)
        self.mask = nn.Conv1d(WIDTH, BINS, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, noisy):
        x = torch.log1p(noisy)
        x = self.layer1(x)
        x = x + self.layer2(x)
        x = x + self.layer3(x)
        return self.sigmoid(self.mask(x)) * noisy


def spectra(n: int, generator: torch.Generator) -> Batch:
    """Noisy and clean magnitudes, (batch, bins, frames): moving harmonics in noise."""
    time, bins = torch.arange(FRAMES), torch.arange(BINS)[:, None]
    spacing = 4 + 4 * torch.rand(n, 1, 1, generator=generator)
    shift = torch.cumsum(0.3 * torch.randn(n, 1, FRAMES, generator=generator), -1)
    comb = torch.relu(torch.cos(2 * math.pi * (bins + shift) / spacing)) ** 2
    beat = 0.6 + 0.5 * torch.cos(0.5 * time + 6 * torch.rand(n, 1, 1, generator=generator))
    clean = 2 * comb * beat * torch.exp(-bins / 20)
    noise = -0.4 * torch.log(torch.rand(n, BINS, FRAMES, generator=generator) + 1e-6)
    return clean + noise, clean


def compressed(estimate: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return F.mse_loss((estimate + 1e-4) ** 0.3, (clean + 1e-4) ** 0.3)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(batch[0])
    return {"loss": compressed(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    error = (tensors["outputs"] - batch[1]).square().sum()
    return {"snr_db": 10 * math.log10(float(batch[1].square().sum()) / max(float(error), 1e-12))}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)

    def sample(step: int, phase: str) -> Batch:
        return spectra(BATCH, seeded(seed, step, len(phase)))

    return Training(Enhancer(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 1e-3))
