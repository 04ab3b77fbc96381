"""Denoising diffusion of small pictures: a U-Net with a time embedding and attention predicts the noise; AdamW, warm-up, clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SIDE, LEVELS, WIDTH, EMBEDDING, ITEMS, BATCH = 16, 100, 16, 32, 500, 12


class TimeEmbedding(nn.Module):
    """Sines and cosines of the noise level's number, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(1000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2)))
        self.linear1 = nn.Linear(WIDTH, EMBEDDING)
        self.activation = nn.SiLU()
        self.linear2 = nn.Linear(EMBEDDING, EMBEDDING)

    def forward(self, times):
        angles = 10 * times[:, None] * self.rates
        return self.linear2(self.activation(self.linear1(torch.cat([angles.sin(), angles.cos()], 1))))


class Residual(nn.Module):
    """Two convolutions, between them the shift that the time asks for."""

    def __init__(self, inputs: int, outputs: int, norm, activation) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.activation1, self.activation2 = activation(), activation()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(EMBEDDING, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        y = self.conv1(self.activation1(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(self.activation2(self.norm2(y)))


class Attention(nn.Module):
    """Every place of the coarse picture looks at all others."""

    def __init__(self, channels: int, norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.heads = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x):
        places = self.norm(x).flatten(2).transpose(1, 2)
        seen = self.heads(places, places, places, need_weights=False)[0]
        return x + seen.transpose(1, 2).unflatten(2, x.shape[2:])


class Denoiser(nn.Module):
    def __init__(self, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU) -> None:
        super().__init__()
        self.embed = TimeEmbedding()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down = Residual(WIDTH, WIDTH, norm, activation)
        self.smaller = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.middle1 = Residual(2 * WIDTH, 2 * WIDTH, norm, activation)
        self.attention = Attention(2 * WIDTH, norm)
        self.middle2 = Residual(2 * WIDTH, 2 * WIDTH, norm, activation)
        self.larger = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, 2)
        self.up = Residual(2 * WIDTH, WIDTH, norm, activation)
        self.norm, self.activation = norm(WIDTH), activation()
        self.out = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, noisy, times):
        """`noisy` is (batch, 1, side, side), `times` from 0 to 1."""
        time = self.embed(times)
        fine = self.down(self.stem(noisy), time)
        x = self.middle1(self.smaller(fine), time)
        x = self.middle2(self.attention(x), time)
        x = self.up(torch.cat([self.larger(x), fine], 1), time)
        return self.out(self.activation(self.norm(x)))


def pictures(n: int, seed: int) -> torch.Tensor:
    """Discs, rings and bars, bright on dark, from -1 to 1."""
    made = seeded(53, seed)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    place = 4 + (SIDE - 8) * torch.rand(n, 2, 1, 1, generator=made)
    size = 2 + 2 * torch.rand(n, 1, 1, generator=made)
    far = ((rows - place[:, 0]).square() + (columns - place[:, 1]).square()).sqrt()
    angle = math.pi * torch.rand(n, 1, 1, generator=made)
    aside = ((rows - place[:, 0]) * angle.cos() + (columns - place[:, 1]) * angle.sin()).abs()
    shapes = torch.stack([size - far, 1 - (far - size).abs(), 1 - aside], 1)
    kind = torch.randint(3, (n,), generator=made)
    return 2 * (shapes[torch.arange(n), kind] + 0.5).clamp(0, 1)[:, None] - 1


def kept(times: torch.Tensor) -> torch.Tensor:
    """Share of the picture's power that is left at a time. Source: Nichol and Dhariwal 2021, arXiv:2102.09672."""
    return torch.cos((times + 0.02) / 1.04 * math.pi / 2).square().clamp(1e-3, 0.999)[:, None, None, None]


def noised(x: torch.Tensor, made: torch.Generator) -> Batch:
    """The noisy pictures, their times, and the noise in them."""
    times = torch.randint(LEVELS, (len(x),), generator=made) / LEVELS
    noise = torch.randn(x.shape, generator=made)
    return kept(times).sqrt() * x + (1 - kept(times)).sqrt() * noise, times, noise


def result(outputs: torch.Tensor, batch: Batch, loss: torch.Tensor | None = None) -> Tensors:
    return {"loss": F.mse_loss(outputs, batch[2]) if loss is None else loss, "outputs": outputs, "targets": batch[2]}


def forward(model: nn.Module, batch: Batch) -> Tensors:
    return result(model(batch[0], batch[1]), batch)


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    error = (tensors["outputs"] - batch[2]).square().mean((1, 2, 3))
    return {"explained": 1 - float(error.mean()), "hardest_error": float(error.max())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": pictures(ITEMS, seed), "val": pictures(200, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        made = seeded(seed, step, len(phase))
        return noised(data[phase][torch.randperm(len(data[phase]), generator=made)[:BATCH]], made)

    return Training(
        Denoiser(**options), sample, forward, measure, lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.01),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 20)), steps=180, clip=1.0, val_every=45,
    )  # fmt: skip
