"""A forecaster: series of a few rhythms, a trend and noise; a projection, an LSTM, a head for the next six values, Adam."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

PAST, HORIZON, FEATURES, BATCH, SERIES = 36, 6, 3, 32, 200  # features: the value, and the time of day as an angle
HOURS = 24


class Forecaster(nn.Module):
    def __init__(self, features: int = FEATURES, width: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.activation = nn.ReLU()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, HORIZON)

    def forward(self, x):
        states, _ = self.lstm(self.activation(self.project(x)))
        return self.head(self.dropout(self.norm(states[:, -1])))


def series(n: int, generator: torch.Generator, length: int = 120) -> torch.Tensor:
    """(n, length): a daily rhythm of the series' own shape, a slower wave, a trend, and noise; standardised."""
    time = torch.arange(length) + torch.randint(HOURS, (n, 1), generator=generator)
    strength, phase = torch.rand(2, n, 3, generator=generator).unbind(0)
    daily = (0.5 + strength[:, :1]) * torch.sin(6.2832 * (time / HOURS + phase[:, :1]))
    double = strength[:, 1:2] * torch.sin(6.2832 * (2 * time / HOURS + phase[:, 1:2]))
    slow = strength[:, 2:] * torch.sin(6.2832 * (time / (3 * HOURS) + phase[:, 2:]))
    return daily + double + slow + 0.15 * torch.randn(n, length, generator=generator)


def windows(values: torch.Tensor, n: int, generator: torch.Generator) -> Batch:
    """Pasts (n, PAST, FEATURES) and what comes next (n, HORIZON)."""
    rows = torch.randint(len(values), (n,), generator=generator)
    starts = torch.randint(values.shape[1] - PAST - HORIZON + 1, (n,), generator=generator)
    cut = values[rows[:, None], starts[:, None] + torch.arange(PAST + HORIZON)]
    angle = 6.2832 * (starts[:, None] + torch.arange(PAST)) / HOURS
    return torch.stack([cut[:, :PAST], angle.sin(), angle.cos()], -1), cut[:, PAST:]


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(batch[0])
    return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Mean absolute error, and what is better about it than to repeat the last value: 1 is perfect, 0 no better."""
    error = (tensors["outputs"] - batch[1]).abs().mean()
    naive = (batch[0][:, -1:, 0] - batch[1]).abs().mean()
    return {"mae": float(error), "skill": float(1 - error / naive)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: series(n, seeded(seed, n)) for phase, n in (("train", SERIES), ("val", 40))}

    def sample(step: int, phase: str) -> Batch:
        return windows(data[phase], BATCH, seeded(seed, step, len(phase)))

    return Training(Forecaster(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 5e-3), clip=1.0)
