"""A keyword spotter: made-up log-mel spectrograms of eight words, separable convolutions with BatchNorm, SGD in one cycle."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from faults._training import Batch, Tensors, Training, seeded

MELS, FRAMES, WORDS, PHONES, WIDTH, BANDS, BATCH, STEPS = 20, 32, 8, 3, 20, 5, 24, 200


class Spotter(nn.Module):
    """A stem that halves both axes, three separable blocks, the mean over time in five bands, a head."""

    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        conv = nn.Conv2d(1, WIDTH, (5, 3), 2, (2, 1), bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm(WIDTH), activation=activation()))
        self.blocks = nn.Sequential(*(separable(WIDTH, norm, activation) for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d((BANDS, 1))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH * BANDS, WORDS)

    def forward(self, x):
        x = self.pool(self.blocks(self.stem(x))).flatten(1)
        return self.head(self.dropout(x))


def separable(width: int, norm, activation) -> nn.Sequential:
    """A filter for each channel, then a mixture of channels, each with its norm."""
    layers = OrderedDict(depthwise=nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), norm1=norm(width))
    layers |= OrderedDict(activation1=activation(), pointwise=nn.Conv2d(width, width, 1, bias=False), norm2=norm(width))
    return nn.Sequential(layers | OrderedDict(activation2=activation()))


def spoken(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of mel bands (n, 1, mels, frames) and words: two formants that pass through three phones, in noise."""
    formants = 2 + (MELS - 4) * torch.rand(WORDS, PHONES, 2, generator=seeded(41))
    words = torch.randint(WORDS, (n,), generator=generator)
    onset, duration = 8 * torch.rand(n, 1, generator=generator), 14 + 8 * torch.rand(n, 1, generator=generator)
    voice, level = 1.5 * torch.randn(n, 1, generator=generator), torch.randn(n, 1, 1, generator=generator)
    position = (torch.arange(FRAMES) - onset) / duration
    phone = (PHONES * position).long().clamp(0, PHONES - 1)
    speaks = ((position >= 0) & (position < 1)).float()[:, None]
    energies = 0.3 * torch.rand(n, MELS, FRAMES, generator=generator).clamp(min=1e-6).log().neg()
    for i, strength in enumerate((1.0, 0.6)):
        centre = (formants[words][..., i].gather(1, phone) + voice)[:, None]
        shape = (-(((torch.arange(MELS)[:, None] - centre) / 1.5) ** 2)).exp()
        energies = energies + strength * speaks * (0.5 * level).exp() * shape
    return energies[:, None], words


def log_mel(energies: torch.Tensor) -> torch.Tensor:
    """Logarithms of energies, with a floor, standardised by the mean and the deviation of all of them."""
    return ((energies + 1e-3).log() + 1.4) / 1.2


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {"accuracy": float((tensors["logits"].argmax(1) == batch[1]).float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: spoken(n, seeded(seed, n)) for phase, n in (("train", 1200), ("val", 240))}

    def sample(step: int, phase: str) -> Batch:
        energies, words = data[phase]
        chosen = torch.randint(len(words), (BATCH,), generator=seeded(seed, step, len(phase)))
        return log_mel(energies[chosen]), words[chosen]

    optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4)  # noqa: E731 - one line beside its program
    schedule = lambda optimizer: OneCycleLR(optimizer, 0.06, total_steps=STEPS)  # noqa: E731
    return Training(Spotter(**options), sample, forward, measure, optimize, schedule, steps=STEPS, val_every=40)
